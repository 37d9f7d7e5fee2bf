"""Records with a question and its answer: JSONL, parquet and every other file that training reads, and tars.

{"question": "...", "image": IMAGE or "images": [...], "answers": ["..."], "choices": ["...", ...]}

Images are spelled as in training data; `<image>` in the question says where one stands, else they come first.
A control (data/controls.py) spoils them, to see whether answers come from the images.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import PIL.Image

from experiments.vlm.config import Data
from experiments.vlm.data.controls import CONTROLS, Painted
from experiments.vlm.data.document import Document, Draft, Image, ImageValue, Picture, Text
from experiments.vlm.data.formats import RECORD_FORMATS, WEBDATASET, Record, captions, format_of
from experiments.vlm.data.formats.conversation import images_of
from experiments.vlm.data.formats.record_files import open_records
from experiments.vlm.data.formats.record_shard import ImageValues, RecordShard, folder_of
from experiments.vlm.data.formats.shard import Shard, ShardFile
from experiments.vlm.data.formats.tar_shard import TarShard, is_tar
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import EMBEDDED, open_copied
from experiments.vlm.data.storage.file_cache import file_cache
from experiments.vlm.evaluate.tasks import LETTERS, Question
from experiments.vlm.generate.record import parse_whole
from experiments.vlm.world import ensure
from experiments.vlm.world.render import png
from torchtitan.config.errors import ConfigError

IDS = ("question_id", "questionId", "id", "uid", "index")
QUESTIONS = ("question", "prompt", "query", "text")
ANSWERS = ("answers", "answer", "references", "captions", "caption", "label", "txt")
CHOICES = ("choices", "options", "endings")
DOCUMENTS = ("captions", "text", "obelics", "mmc4")  # formats that have a perplexity
COLUMNS = tuple(dict.fromkeys((*IDS, *QUESTIONS, *ANSWERS, *CHOICES, *WEBDATASET.columns)))


class Questions:
    """The records of one file, read one by one. Raises ConfigError where it cannot be opened."""

    def __init__(self, path: str, data: Data, documents: bool = False, control: str = ""):
        """`documents`: the records are whole documents, without a question. `control`: one of CONTROLS."""
        self.path = _only_file(path, data)
        self.documents = documents
        self.control = control
        self.record: Record = {}
        try:
            self.shard = open_copied(self.path, data, lambda file: self._open(file, data))
        except (OSError, Rejected, ValueError) as error:
            raise ConfigError(f"{self.path}: cannot be read ({error})") from None
        for rejected in self.shard.rejects:  # without its end the figures would be those of other records
            raise ConfigError(f"{self.path}: {rejected}")

    def _open(self, file: ShardFile, data: Data) -> Shard:
        cache = file_cache(data)
        if is_tar(file.local):
            return TarShard(file.local, COLUMNS, self._parse, cache)
        images, records = ImageValues(folder_of(file.path), data), open_records(file.local, None, cache)
        return RecordShard(records, images, self._parse, lambda draft: draft, 0)

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, number: int, pictures: bool = True) -> Question:
        """One record. Without `pictures` only its texts, and no image is loaded.

        Raises ConfigError that names the record, and what is wrong with it but for its images.
        """
        try:
            document, fault = self._document(number)
            record = self.record  # kept: looking for another record's images (a control) replaces it
            names = (record[name] for name in IDS if record.get(name) is not None)
            id, asked = str(next(names, self.shard.key(number))), asked_of(record)
            called, choices = choices_of(record)
            question = Question(number, id, [asked], answers_of(record), choices, called, fault)
        except Rejected as rejected:
            raise ConfigError(f"{self.path}, record {number}: {rejected}") from None
        if document is None:
            return question
        try:
            return replace(question, content=self._content(document, number, pictures))
        except Rejected as rejected:
            return replace(question, fault=str(rejected))

    def _document(self, number: int) -> tuple[Document | None, str]:
        """The document, or what is wrong with an image of it."""
        try:
            document, lost = self.shard.read(number)
            for rejected in lost:
                raise rejected
            return document, ""
        except Rejected as rejected:
            if rejected.image is None:
                raise
            return None, f"image {rejected.image + 1}: {rejected}"

    def _content(self, document: Document, number: int, pictures: bool) -> list[str | Picture]:
        if not pictures:
            document = replace(document, parts=[p for p in document.parts if not isinstance(p, Image)])
        elif self.control:
            document = CONTROLS[self.control](document, self.shard, number)
        return [self._part(part) for part in document.parts]

    def _part(self, part: Any) -> str | Picture:
        if not isinstance(part, Image):
            return part.text
        if isinstance(part.locator, Painted):
            return Picture(png(PIL.Image.fromarray(part.locator.paint(part.height, part.width))))
        return Picture(self.shard.load(part))

    def _parse(self, record: Record) -> Draft:
        self.record = record
        if self.documents:
            found = format_of(record) or "captions"
            if found not in DOCUMENTS:
                raise Rejected("wrong_shape", f"a record of {found}; read are {', '.join(DOCUMENTS)}")
            return RECORD_FORMATS[found].parse(record)
        asked, held = asked_of(record), dict(record)
        if not images_of(record):  # a record of captions has others
            names = ("image_url", "image_path") if asked else captions.NAMED
            held |= next(({"image": record[name]} for name in names if record.get(name)), {})
        held["messages"] = [{"role": "user", "content": asked}, {"role": "assistant", "content": ""}]
        (turn, _) = parse_whole(held).turns
        parts: list[Any] = [part if isinstance(part, ImageValue) else Text(part) for part in turn.content]
        # A record without question and image is empty, and finish() says so.
        return Draft(parts, caption=True)


def _only_file(path: str, data: Data) -> str:
    """The path itself, or the file of embedded:WORLD/SPLIT, drawn if it is not there yet."""
    if not path.startswith(EMBEDDED):
        return path
    files = sorted(ensure(path.removeprefix(EMBEDDED), data.cache_folder).iterdir())
    if len(files) > 1:
        raise ConfigError(f"{path}: {len(files)} files: name one of them, for example {files[0]}")
    return str(files[0])


def asked_of(record: Mapping[str, Any]) -> str:
    """The question, empty where there is none. Raises Rejected for one that is no text."""
    name, asked = next(((name, record[name]) for name in QUESTIONS if record.get(name) is not None), ("", ""))
    if not isinstance(asked, str):
        raise Rejected("wrong_shape", f"{name} is a {type(asked).__name__}, no text")
    return asked


def answers_of(record: Mapping[str, Any]) -> list[str]:
    """Every right answer; [{"answer": "..."}, ...] of VQA as well. Raises Rejected for another shape."""
    found: Any = next((record[name] for name in ANSWERS if record.get(name) not in (None, [])), [])
    listed = found if isinstance(found, list) else [found]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in listed]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise Rejected("wrong_shape", "answers are no texts")
    return [str(text) for text in texts]


def choices_of(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The texts to choose from, in order, with their names where it is {"A": "...", ...}. Raises Rejected for
    another shape.
    """
    found: Any = next((record[name] for name in CHOICES if record.get(name)), [])
    names: list[str] = []
    if isinstance(found, dict):
        names = sorted(found, key=lambda name: (len(name), name))  # "10" behind "9"
        found = [found[name] for name in names]
    if not isinstance(found, list) or not all(isinstance(text, str | int | float) for text in found):
        raise Rejected("wrong_shape", "choices are no list of texts")
    if len(found) > len(LETTERS):
        raise Rejected("wrong_shape", f"{len(found)} choices, more than {len(LETTERS)}")
    return names, [str(text) for text in found]
