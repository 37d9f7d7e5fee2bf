"""LLaVA-1.5 and LLaVA-NeXT answer as transformers does: the same greedy text, by the command and in an
evaluation.
"""

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from experiments.commands import main
from tests.reference.hf_folders import save, write_job
from tests.reference.tiled_models import tiled_model
from tests.samples import noise, write_jsonl
from tests.unit.test_llava import SIDE, llava

SHIPPED = Path(__file__).parents[2] / "assets/tokenizer"
TOKENS = 10
EXACT = ["--training.mixed_precision_param", "float32"]
QUESTIONS = [
    {"id": "none", "prompt": "What is 2 + 2?", "images": []},
    {"id": "one", "prompt": "<image>\nWhat is it?", "images": ["a.png"]},
    {
        "id": "several",
        "prompt": "In <image> and <image>, what differs from <image>?",
        "images": ["b.png", "a.png", "c.png"],
    },
]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def exported(request, tmp_path_factory) -> Path:
    """The folder of a random model with our tokenizer, pictures and questions next to it."""
    at = tmp_path_factory.mktemp("llava")
    save(
        {"llava": llava, "llava_next": partial(tiled_model, "next")}[request.param](rows=1024), at / "theirs"
    )
    write_job(at / "job.toml", SHIPPED)
    assert main(["from_hf", "--hf", str(at / "theirs"), "--out", str(at / "checkpoint")]) == 0
    job = ["--job.config_file", str(at / "job.toml"), "--checkpoint", str(at / "checkpoint")]
    assert main(["to_hf", *job, "--out", str(at / "hf")]) == 0
    for seed, name in enumerate("abc"):  # squares of its own size: else a level of a pixel can change a word
        Image.fromarray(noise(SIDE, SIDE, seed=seed)).save(at / f"{name}.png")
    write_jsonl(at / "questions.jsonl", QUESTIONS)
    return at / "hf"


def said_by_transformers(folder: Path) -> dict[str, str]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    said = {}
    for question in QUESTIONS:
        pictures = (Image.open(folder.parent / name) for name in question["images"])
        content = []
        for number, text in enumerate(question["prompt"].split("<image>")):
            content += [{"type": "image", "image": next(pictures)}] if number else []
            content += [{"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
        )
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        said[question["id"]] = processor.decode(new, skip_special_tokens=True)
    return said


def test_generation_and_evaluation_say_what_transformers_says_of_no_image_one_and_several(exported):
    out, expected = exported.parent / "answers.jsonl", said_by_transformers(exported)
    asked = ["--input", str(exported.parent / "questions.jsonl"), "--max_tokens", str(TOKENS), *EXACT]
    assert main(["generate", "--hf", str(exported), *asked, "--out", str(out)]) == 0
    answers = {a["id"]: a["text"] for a in map(json.loads, out.read_text().splitlines())}
    assert answers == expected and all(expected.values())

    task, folder = exported.parent / "task.jsonl", exported.parent / "evaluation"
    write_jsonl(
        task, [question | {"question": question["prompt"], "answers": [""]} for question in QUESTIONS]
    )
    evaluated = ["--task", f"exact_match={task}", "--out", str(folder)]
    assert main(["evaluate", "--hf", str(exported), *evaluated, *EXACT]) == 0
    lines = map(json.loads, (folder / "exact_match.jsonl").read_text().splitlines())
    predicted = [line["prediction"] for line in sorted(lines, key=lambda line: line["id"])]
    begun = zip(predicted, (expected[question["id"]] for question in QUESTIONS), strict=True)
    assert all(long.startswith(short.rstrip("\ufffd").strip()) for long, short in begun)
