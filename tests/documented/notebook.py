"""Runs the cells of a notebook in this process, and writes it with what they gave.

    python -m tests.documented.notebook docs/notebook.ipynb docs/notebook.ipynb

Enough of a kernel for ours: what is printed, and the value of a cell's last line, as text or as a picture.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def run(notebook: dict[str, Any]) -> None:
    """In place. What a cell raises is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        cell["outputs"] = _outputs("".join(cell["source"]), names, number)


def _outputs(source: str, names: dict[str, Any], number: int) -> list[Cell]:
    *body, last = ast.parse(source).body
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(body, []), f"<cell {number}>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names)
        else:
            exec(compile(source, f"<cell {number}>", "exec"), names)
    outputs: list[Cell] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "metadata": {},
                "data": _shown(value),
            }
        )
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if hasattr(value, "_repr_png_"):  # its repr holds an address, which would differ each time
        return {"text/plain": ["a picture"], "image/png": base64.b64encode(value._repr_png_()).decode()}
    return {"text/plain": _lines(repr(value))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    read, write = map(Path, sys.argv[1:])
    notebook = json.loads(read.read_text(encoding="utf-8"))
    run(notebook)
    write.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
