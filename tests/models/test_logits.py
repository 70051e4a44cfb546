"""Whether a model takes logits_to_keep, which its forward's signature tells."""

from __future__ import annotations

import peft
from torch import nn

import tiny
from rotmole.models.logits import accepts_logits_to_keep


class Plain(nn.Module):
    """A model without the argument."""

    def forward(self, input_ids, **options):
        return input_ids


def test_the_signature_of_the_base_model_decides():
    model = tiny.llama()
    assert accepts_logits_to_keep(model)
    assert accepts_logits_to_keep(peft.get_peft_model(model, peft.LoraConfig(r=2)))
    assert not accepts_logits_to_keep(Plain())
