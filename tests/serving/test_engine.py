"""Answers of a server's engines are those of `rotmole generate`, however many there are at once."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
import torch

from rotmole import RotMoleConfig
from rotmole.errors import InputError
from rotmole.evaluation.generation import prompt_tokens
from rotmole.serving import engine as engine_room
from rotmole.serving.engine import Batched, OneByOne, Sampling, can_batch
from rotmole.serving.memory import BLOCK
from rotmole.serving.models import Served, load_models, named_targets

PROMPTS = ["the film", "red blue green", "is good the film is bad " * 9, "a"]
SAMPLED = {"temperature": 1.3, "top_p": 0.9}


@pytest.fixture(scope="module")
def models(targets) -> list[Served]:
    return load_models(named_targets([str(target) for target in targets]))


@contextlib.contextmanager
def running(kind: type, served: Served):
    engine = Batched(served, 6 * BLOCK) if kind is Batched else OneByOne(served)
    try:
        yield engine
    finally:
        engine.stop()


async def answered(engine, prompt: str, sampling: Sampling):
    answer = begin(engine, prompt, sampling).answer
    await asyncio.wait_for(answer.done.wait(), 60)
    assert answer.error is None
    return answer


def begin(engine, prompt: str, sampling: Sampling):
    return engine.start(prompt_tokens(prompt, engine.served.tokenizer), sampling)


def streamed(answer) -> str:
    parts = []
    while (part := answer.queue.get_nowait()) is not None:
        parts.append(part)
    return "".join(parts)


@pytest.mark.parametrize("kind", [Batched, OneByOne])
def test_answers_are_those_of_generate(kind, models, alone, monkeypatch):
    """Greedy and sampled ones together, of adapters and base, whole and in pieces."""
    monkeypatch.setattr(engine_room, "BATCH_TOKENS", 32)  # the long prompt takes several steps
    assert [served.name for served in models] == ["red", "blue", "base"]

    async def all_at_once(engine):
        orders = [
            (prompt, Sampling(12, seed=seed, **options))
            for seed, prompt in enumerate(PROMPTS)
            for options in ({}, SAMPLED)
        ]
        return orders, await asyncio.gather(*(answered(engine, *order) for order in orders))

    for served in models:
        with running(kind, served) as engine:
            orders, answers = asyncio.run(all_at_once(engine))
        for (prompt, sampling), answer in zip(orders, answers, strict=True):
            options = {name: getattr(sampling, name) for name in ("temperature", "top_p", "seed")}
            expected = alone[served.name].text(prompt, max_new_tokens=12, **options)
            assert answer.text() == expected
            assert streamed(answer) == expected


@pytest.mark.parametrize("kind", [Batched, OneByOne])
def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(kind, models, alone):
    whole = alone["red"].text("the film", max_new_tokens=20)
    stop = whole[5:8]
    before = whole[: whole.index(stop)]
    with running(kind, models[0]) as engine:
        answer = asyncio.run(answered(engine, "the film", Sampling(20, stop=(stop,))))
    assert answer.text() == streamed(answer) == before
    assert len(answer.tokens) < 20


@pytest.mark.parametrize("kind", [Batched, OneByOne])
def test_a_cancelled_answer_leaves_the_others_alone(kind, models, alone):
    async def some(engine):
        cancelled = begin(engine, "red", Sampling(400))
        kept = begin(engine, "the film", Sampling(12))
        while len(cancelled.answer.tokens) < 3:
            await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.wait_for(kept.answer.done.wait(), 60)
        after = await answered(engine, "the film", Sampling(12))
        assert len(cancelled.answer.tokens) < 300
        return kept.answer.text(), after.text()

    with running(kind, models[0]) as engine:
        texts = asyncio.run(some(engine))
        expected = alone["red"].text("the film", max_new_tokens=12)
        assert texts == (expected, expected)
        if kind is Batched:
            assert not engine._manager.output_router.result_handlers
            # tokens of the step at work; the next one to be cancelled removes them
            assert engine._manager.output_router.output_queue.qsize() <= 3


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(models):
    config = models[1].model.generation_config
    before = config.eos_token_id
    with running(Batched, models[1]) as engine:
        whole = asyncio.run(answered(engine, "the film", Sampling(12))).tokens
    end = next(token for token in whole if whole.index(token) >= 3)
    try:
        config.eos_token_id = end
        with running(Batched, models[1]) as engine:
            answer = asyncio.run(answered(engine, "the film", Sampling(12)))
    finally:
        config.eos_token_id = before
    assert answer.tokens == whole[: whole.index(end)]


def test_what_does_not_fit_is_refused_with_both_numbers(models):
    async def too_long(engine):
        begin(engine, "the film", Sampling(5000))

    async def just_fits(engine):
        prompt = [5] * (engine.room - 2)
        running = engine.start(prompt, Sampling())
        await asyncio.wait_for(running.answer.done.wait(), 60)
        return len(running.answer.tokens), running.answer.error

    with running(Batched, models[0]) as engine:
        with pytest.raises(InputError, match="and 5000 new ones are more than the 512"):
            asyncio.run(too_long(engine))
        assert asyncio.run(just_fits(engine)) == (2, None)


def test_more_than_the_cache_holds_waits_and_is_not_lost(models, alone):
    """Twelve answers that need a block each, in a cache of five."""

    async def many(engine):
        orders = [answered(engine, "the film", Sampling(30)) for _ in range(12)]
        return [answer.text() for answer in await asyncio.gather(*orders)]

    with running(Batched, models[0]) as engine:
        texts = asyncio.run(many(engine))
    assert texts == [alone["red"].text("the film", max_new_tokens=30)] * 12


def test_a_stopped_engine_is_not_alive(models):
    for kind in (Batched, OneByOne):
        with running(kind, models[0]) as engine:
            assert engine.is_alive()
        assert not engine.is_alive()


def test_adapters_that_compare_the_tokens_of_a_text_are_not_batched(models):
    config = {"default": RotMoleConfig(selection="expert_choice")}
    assert "expert_choice" in can_batch(Served("x", SimpleNamespace(peft_config=config), None))
    assert all(can_batch(served) is None for served in models)


def test_models_share_the_tensors_of_their_base(models):
    red, blue, base = (served.model for served in models)
    adapted = red.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    plain = base.model.layers[0].self_attn.q_proj.weight
    assert adapted.data_ptr() == plain.data_ptr()
    assert blue.get_base_model().lm_head.weight.data_ptr() == base.lm_head.weight.data_ptr()
    with torch.no_grad():
        before = plain.clone()
        adapted.data = adapted.data * 2  # as some PEFT methods do when they are loaded
    assert torch.equal(plain, before)
    adapted.data = plain.data
