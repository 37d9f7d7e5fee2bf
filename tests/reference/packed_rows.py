"""Labels, visual indices and pieces, said slowly: what a packed row must hold."""

from collections.abc import Sequence


def labels(tokens: Sequence[int], document_ids: Sequence[int], never: set[int]) -> list[int]:
    """Next token inside the same document, -100 where it is one of `never` (image, begin, end, bos, padding)
    or there is none.
    """
    result = []
    for place in range(len(tokens)):
        following = place + 1
        same = (
            following < len(tokens)
            and document_ids[place] >= 0
            and document_ids[following] == document_ids[place]
        )
        result.append(tokens[following] if same and tokens[following] not in never else -100)
    return result


def positions(document_ids: Sequence[int]) -> list[int]:
    """0, 1, 2 ... inside each document, 0 on padding."""
    result, seen = [], {}
    for document in document_ids:
        result.append(0 if document < 0 else seen.get(document, 0))
        seen[document] = seen.get(document, 0) + 1
    return result
