"""Records of a task as one HTML page: pictures, question, answers, prediction and score, the worst first."""

import html
import io
import math
from base64 import b64encode
from importlib.resources import files
from string import Template

from experiments.vlm.data.document import Picture
from experiments.vlm.evaluate.asking import QuestionSet
from experiments.vlm.evaluate.exhibits import thumbnail
from experiments.vlm.evaluate.tasks import Line, Question, Task


def results_page(name: str, task: Task, questions: QuestionSet, lines: list[Line], limit: int) -> str:
    """At most `limit` records, spread evenly from the worst to the best by the task's first metric."""
    first = next((name for line in lines for name in line["scores"]), "")
    worst_last = task.way == "read"  # a high perplexity is bad
    no_score = math.inf if worst_last else -math.inf
    by_score = [(line["scores"].get(first, no_score), number) for number, line in enumerate(lines)]
    order = [number for _, number in sorted(by_score, reverse=worst_last)]
    shown = order if len(order) <= limit else [order[i * len(order) // limit] for i in range(limit)]
    facts = f"{len(shown)} of {len(lines)} records, the worst first, by {first}"
    return Template(files(__package__).joinpath("results_page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(name),
        facts=html.escape(facts),
        records="\n".join(_record(questions.read(i), lines[i]) for i in shown),
    )


def _record(question: Question, line: Line) -> str:
    shown = [] if "error" in line else question.content  # an image may be what is wrong
    pictures = "".join(_picture(part) for part in shown if isinstance(part, Picture))
    asked = " ".join(part for part in question.content if isinstance(part, str))
    scores = ", ".join(f"{name} {value:g}" for name, value in line["scores"].items())
    rows = [("question", asked), ("answers", " | ".join(question.answers))]
    if question.choices:
        logprobs = line.get("logprobs") or [""] * len(question.choices)
        pairs = zip(question.choices, logprobs, strict=True)
        rows.append(("choices", " | ".join(f"{choice} {value}".strip() for choice, value in pairs)))
    if "prediction" in line:
        rows.append(("prediction", line["prediction"]))
    rows += [("not asked", line["error"])] if "error" in line else []
    rows.append(("score", scores))
    table = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    name = f"<small>{html.escape(question.id)}</small>"
    return f"<section><div>{pictures}</div><table>{table}</table>{name}</section>"


def _picture(picture: Picture) -> str:
    file = io.BytesIO()
    thumbnail(picture).save(file, "jpeg", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}">'
