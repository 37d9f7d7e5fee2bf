"""What is wrong with a sample, an image or a shard: one exception, one fixed list of reasons.

A reader raises `Rejected` for a record that gives no document, and returns a list of them for the images that
a document lost and still makes sense without. Its caller counts them by reason; nothing here stops a run.
"""

from dataclasses import asdict, dataclass
from typing import Any

REASONS = {
    "image_empty": "the image has no bytes",
    "image_undecodable": "Pillow does not open, load or convert the image",
    "image_truncated": "the image ends before its last row",
    "image_too_large": "more pixels than Pillow allows, or more bytes than an image may have",
    "image_missing": "no member, file or address where the record says the image is",
    "image_outside": "the image's path leaves the folder of its record file",
    "image_fetch": "the image's address did not answer with an image in time",
    "image_address": "the image's address is private, loopback or link-local, or not http(s)",
    "image_unplaced": "an image without a place in the text: more images than slots, or both at one index",
    "caption_missing": "an image without a caption",
    "empty_document": "neither text nor images",
    "broken_utf8": "text that is not UTF-8",
    "broken_json": "a record that is not JSON",
    "wrong_shape": "a record whose fields are not what its format says",
    "reader_failed": "the reader failed, a fault of the program: the log has the first traceback",
    "chat_template": "the chat template refuses the conversation",
    "no_answer": "a conversation without a turn of the assistant",
    "excluded": "the data set's own list leaves the sample out (.nv-meta)",
    "too_long": "longer than a slot (data.long_documents = drop)",
    "shard_missing": "the shard is not there, or not any more",
    "shard_truncated": "the shard ends early; what is whole was read",
    "shard_damaged": "parts of the shard are damaged; what is whole was read",
    "shard_unreadable": "the shard is there but cannot be read",
}


OF_PREPARE = {  # and http_404, http_500 ...: how data preparation divides image_fetch and image_address
    "timeout": "the image's address did not answer in time",
    "connection": "the connection to the image's address failed",
    "dns": "the name in the image's address is not known",
    "tls": "the image's address has no valid certificate",
    "incomplete": "the answer ended before the image did",
    "bad_response": "the answer is not HTTP",
    "too_many_redirects": "the image's address leads from one to the next",
    "bad_url": "the image's address is not one of http(s)",
    "private_address": "the image's address is private, loopback or link-local",
    "duplicate_url": "an earlier image has the same address",
    "duplicate_content": "an earlier image has the same bytes",
}


def meaning(reason: str) -> str:
    """For people. Raises KeyError for a reason that there is not."""
    status = reason.removeprefix("http_")
    if status.isdigit():
        return f"the image's address answered with HTTP status {status}"
    return REASONS.get(reason) or OF_PREPARE[reason]


class Rejected(Exception):
    """One sample, image or shard that cannot be used.

    reason: a key of REASONS, or of OF_PREPARE. detail: what exactly, for people. image: the position of the
    image among those of its record, where it is an image that was lost.
    """

    def __init__(self, reason: str, detail: str = "", image: int | None = None):
        meaning(reason)  # an unknown one is a fault of the program
        super().__init__(reason, detail, image)  # all three as args, so that it pickles
        self.reason = reason
        self.detail = detail
        self.image = image

    def __str__(self) -> str:
        return f"{meaning(self.reason)} ({self.detail})" if self.detail else meaning(self.reason)


@dataclass(frozen=True)
class Reject:
    """One sample, image (`image` says which of its sample) or shard (no key) that was not used."""

    source: str
    shard: str
    key: str
    reason: str
    detail: str = ""
    image: int | None = None

    @property
    def kind(self) -> str:
        """What was lost: "samples", "images" or "shards"."""
        return "images" if self.image is not None else "samples" if self.key else "shards"

    def line(self) -> dict[str, Any]:
        """For a file of rejects; `Reject(**line)` undoes it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return str(Rejected(self.reason, self.detail))
