"""Ranks that share a model answer as one process does, each its own prompts, however many it has."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import Data
from experiments.vlm.evaluate.evaluation import Evaluation, evaluate
from experiments.vlm.evaluate.tasks import TASKS
from experiments.vlm.generate.answer_file import answer_one
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.forward import CachedVLM
from experiments.vlm.generate.layout import agreement, attach_cache, parallelize_for_answers
from experiments.vlm.model.vlm import VLM
from tests.reference.small_run import job_of
from tests.unit.test_evaluate import write
from tests.unit.test_generate import BUDGET, CPU, PLAN, TOKENIZER, prompter, prompts, vlm
from tests.unit.test_generate import answers as answers_alone
from tests.unit.test_generate import engine as engine_alone
from torchtitan.components.weights import fill, to_empty
from torchtitan.config.errors import UserError
from torchtitan.config.layout import degrees
from torchtitan.distributed.mesh import build_mesh
from torchtitan.generation.engine import Engine, Request
from torchtitan.generation.kv_cache import KVCache


def answering_on_rank(changes: dict, decoder: str) -> Answering:
    changes = {f"parallelism.{key}": value for key, value in changes.items()} | {"debug.seed": 3}
    job = job_of(changes, "/nowhere")
    mesh = build_mesh(degrees(job.parallelism, dist.get_world_size()), CPU)
    config = vlm(decoder).config
    with torch.device("meta"):
        model = VLM(config, TOKENIZER.vocab_size, "sdpa", 64)
    parallelize_for_answers(model, mesh, job)
    to_empty([model], CPU)
    fill([model], model.tied_names(), job.debug.seed)
    cache = attach_cache(model.eval(), mesh, job, 2, 420)
    shape = BatchShape(1, 0, BUDGET.patch_rows, BUDGET.patches_per_row, PLAN.patch_size)
    engine = Engine(CachedVLM(model, shape), cache, TOKENIZER, [TOKENIZER.eos_id], agreement(mesh))
    return Answering(engine, prompter(), mesh)


def answers_on_rank(changes: dict, decoder: str) -> dict[int, tuple[list[int], list[float]]]:
    """Prompt i is answered by data rank i mod data ranks, so that some have more than others. One that is
    asked alone is answered by all, and written by the first.
    """
    answering = answering_on_rank(changes, decoder)
    with contextlib.redirect_stdout(io.StringIO()) as written:
        answer_one(answering, ["once upon"], lambda number, prompt: Request(number, prompt, max_tokens=3))
    assert (written.getvalue() != "") == (dist.get_rank() == 0)
    data = answering.mesh.data
    mine = list(enumerate(prompts()))[data.get_local_rank() :: data.size()]
    requests = [Request(number, prompt, max_tokens=3 + number) for number, prompt in mine]
    done = [event.answer for event in answering.engine.answer(requests) if event.answer.ended]
    return {answer.request.number: (answer.ids, answer.logprobs) for answer in done}


@pytest.mark.parametrize(
    ("ranks", "changes", "decoder"),
    [
        pytest.param(2, {}, "qwen3", marks=pytest.mark.slow),
        pytest.param(2, {"tensor_parallel_degree": 2}, "qwen3-tied", marks=pytest.mark.slow),
        (4, {"tensor_parallel_degree": 2}, "llama"),
    ],
    ids=["fsdp2", "tp2", "fsdp2.tp2"],
)
def test_ranks_answer_as_one_process_does(pool, ranks, changes, decoder):
    expected = answers_alone(engine_alone(2, vlm(decoder)), prompts(), 7)
    found: dict = {}
    for answered in pool.run(ranks, answers_on_rank, changes, decoder):
        for number, (ids, logprobs) in answered.items():
            assert found.setdefault(number, ids) == ids  # ranks of a group say the same
            assert ids == expected[number].ids[: 3 + number]
            assert logprobs == pytest.approx(expected[number].logprobs[: 3 + number], abs=1e-4)
    assert found.keys() == set(range(5))


def without_memory_on_one() -> None:
    """Of two ranks, the second."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(KVCache, "attach", lambda *_: torch.zeros(1 << 60))
        with pytest.raises(UserError, match="no memory for 2 answers at one time of 420 tokens"):
            answering_on_rank({}, "llama")


def test_all_ranks_say_that_one_has_no_memory_for_answers(pool):
    pool.run(2, without_memory_on_one)


def evaluated_on_rank(changes: dict, path: str, folder: str) -> dict:
    answering, out = answering_on_rank(changes, "llama"), Path(folder)
    data = Data(cache_folder=str(out / "cache"))
    evaluations = [
        Evaluation(name, TASKS[name], path, out, answering, data) for name in ("vqa", "multiple_choice")
    ]
    return evaluate(evaluations, out, {"model": "tiny", "chat_template": "chatml"}, 10)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {}, id="2", marks=pytest.mark.slow),
        pytest.param(4, {"tensor_parallel_degree": 2}, id="4", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_gives_the_same_summary(pool, tmp_path, ranks, changes):
    path = write(tmp_path, "jsonl")
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    alone = pool.run(1, evaluated_on_rank, {}, path, str(tmp_path / "alone"))[0]
    first, *others = pool.run(ranks, evaluated_on_rank, changes, path, str(tmp_path / "shared"))
    assert first == alone and alone["tasks"].keys() == {"vqa", "multiple_choice"} and not any(others)
    texts = [(tmp_path / name / "vqa.jsonl").read_text() for name in ("alone", "shared")]
    assert texts[0] == texts[1]
