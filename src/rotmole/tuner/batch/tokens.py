"""What routers, losses and load counts ask of the batch, and what is said if it is unknown."""

from __future__ import annotations

from torch import Tensor

from rotmole.errors import ModelError
from rotmole.ops.routing.routers import ROUTERS
from rotmole.ops.routing.selection import SELECTIONS
from rotmole.ops.spec import NO_TOKENS, Spec, Tokens
from rotmole.tuner.batch.batch import Batch, Layout
from rotmole.tuner.batch.losses import LossWeights
from rotmole.tuner.batch.reading import TASKS
from rotmole.tuner.batch.stack import Stack


def reads_ids(router: str) -> bool:
    """Tell whether a router needs token ids."""
    return ROUTERS[router].reads == "ids"


def reads_sequences(selection: str) -> bool:
    """Tell whether a selection looks at the other tokens of a sequence."""
    return SELECTIONS[selection].sequences


def tokens_for_router(spec: Spec, batch: Batch, x: Tensor) -> Tokens:
    """Return what the scaling gate wants to know of the tokens of x [..., D].

    Raises:
        ModelError: the router needs token ids, or the selection padding and sequences, and the
            batch does not say them for x.
    """
    if spec.num_experts == 1:
        return NO_TOKENS
    ids, sequences = reads_ids(spec.router), reads_sequences(spec.selection)
    if not (ids or sequences):
        return NO_TOKENS
    batch.check_known()
    return _ids(batch, x) if ids else _sequences(batch, x)


def _ids(batch: Batch, x: Tensor) -> Tokens:
    layout = batch.layout(x)
    if layout is not None and layout.tokens.ids_T is not None:
        return layout.tokens
    if batch.ids is None:
        raise ModelError(
            "router 'hash' chooses experts by token id, and the model was called without input_ids "
            "(with inputs_embeds, or one of its parts by itself); pass input_ids to the whole "
            "model, or choose another router"
        )
    raise ModelError(
        f"router 'hash' got token ids of shape {tuple(batch.ids.shape)} and a layer input of "
        f"shape {tuple(x.shape)}: that layer does not see one row for each token; leave it out "
        "of target_modules, or choose another router"
    )


def _sequences(batch: Batch, x: Tensor) -> Tokens:
    layout = batch.layout(x)
    if layout is not None and not batch.unclear:
        return layout.tokens
    raise ModelError(
        f"selection 'expert_choice' got a layer input of shape {tuple(x.shape)} and cannot tell "
        "its sequences and padding (inputs must be [sequences, positions, features], as the "
        "attention mask says); leave that layer out of target_modules, or choose another selection"
    )


def warn_of_unknown_rows(
    stack: Stack, path: str, batch: Batch, layout: Layout | None, weights: LossWeights, x: Tensor
) -> None:
    """Warn once a stack if a loss or a load count cannot know padding, sequences or tasks.

    Args:
        stack: of the layer, which remembers its warnings.
        path: of the layer in the model.
        batch: at hand.
        layout: of x in the batch, None if it is unknown.
        weights: of the losses.
        x: the layer's input.
    """
    if layout is None:
        stack.warn_once(
            "rows",
            f"module {path!r} got an input of shape {tuple(x.shape)}, whose rows cannot be matched "
            f"with the batch{f' of {batch.shape} tokens' if batch.shape else ''}: in its balance "
            "losses and load counts all rows count, padding included, as one sequence; leave it "
            "out of target_modules to avoid that",
        )
    elif batch.unclear:
        stack.warn_once(
            "padding",
            f"module {path!r} cannot tell which tokens are padding ({batch.unclear}): in its "
            "balance losses and load counts all tokens count; pass the attention mask as [rows, "
            "tokens], or leave the module out of target_modules",
        )
    if weights.task and batch.tasks is None:
        stack.warn_once(
            "tasks",
            f"router_task_loss_coef is on, but the batch has no {TASKS} (whole numbers, one a "
            "row), so that loss does not act; give it beside input_ids",
        )
