"""From the ids of documents to blocks: how a recipe joins, cuts, marks and fills up."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lomdm_jax.data.tokenizers import Tokenizer
from lomdm_jax.errors import UserError

PACKINGS = ("wrap", "documents", "padded")


class Rules(NamedTuple):
    """How documents become blocks.

    packing: "wrap" joins documents and cuts the stream; "documents" does the same, and attention
      does not cross from one to another; "padded" gives each document a block of its own, cut at
      the end or filled up with pads.
    length: ids per block, L.
    separator: ids after each document, of "wrap" and "documents".
    start, end: ids that each block starts and ends with.
    group: so many documents are cut into blocks together and what is left of them is dropped; 0
      carries it on. MDLM does so with 1,000 (kuleshov-group/mdlm, dataloader.py).
    """

    packing: str
    length: int
    separator: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    group: int = 0

    @property
    def body(self) -> int:
        """Ids of a block that come from documents."""
        return self.length - len(self.start) - len(self.end)


def check_rules(data: Any) -> None:
    """Checks the config section `data` for rules that contradict each other.

    Raises:
        UserError: names the key, its value and the remedy.
    """
    if data.packing not in PACKINGS:
        raise UserError(f"data.packing is {data.packing!r}; use one of {', '.join(PACKINGS)}.")
    if data.separator_id != "eos" and not data.separator_id.isdigit():
        raise UserError(
            f"data.separator_id is {data.separator_id!r}; give an id, such as '101', or 'eos' for "
            "the tokenizer's own."
        )
    if data.length <= data.insert_bos + data.insert_eos:
        raise UserError(
            f"data.length is {data.length}; a block needs at least one token beside the "
            f"{data.insert_bos + data.insert_eos} of data.insert_bos and data.insert_eos."
        )
    if data.packing == "documents" and (
        not data.insert_separator or data.separator_id != "eos" or data.insert_bos + data.insert_eos
    ):
        raise UserError(
            "data.packing is 'documents', which finds the end of a document by its separator: use "
            "data.insert_separator = true, data.separator_id = 'eos', data.insert_bos = false and "
            "data.insert_eos = false."
        )
    if data.packing == "padded" and data.group:
        raise UserError(f"data.group is {data.group}, but 'padded' cuts no groups: use 0.")


def make_rules(data: Any, tokenizer: Tokenizer) -> Rules:
    """The rules of the config section `data`, in ids of the tokenizer.

    Raises:
        UserError: data.separator_id is no id of the tokenizer's, or its mask id.
    """
    separator = tokenizer.eos_id if data.separator_id == "eos" else int(data.separator_id)
    if separator >= tokenizer.rows or separator == tokenizer.mask_id:
        raise UserError(
            f"data.separator_id is {separator}; give an id below {tokenizer.rows} other than the "
            f"mask id, {tokenizer.mask_id}."
        )
    padded = data.packing == "padded"
    start, end = (tokenizer.bos_id, tokenizer.eos_id) if padded else (separator, separator)
    return Rules(
        data.packing,
        data.length,
        separator=(separator,) if data.insert_separator and not padded else (),
        start=(start,) if data.insert_bos else (),
        end=(end,) if data.insert_eos else (),
        group=data.group,
    )


class Packer:
    """Documents in, blocks out; what is left over waits for the next documents.

    Attributes:
        carry_N: ids that wait.
        documents: how many documents came in.
        dropped: ids that no block holds: left over from a group, or beyond the end of a block.
    """

    def __init__(
        self, rules: Rules, carry_N: np.ndarray, documents: int = 0, dropped: int = 0
    ) -> None:
        self._rules = rules
        self.carry_N, self.documents, self.dropped = carry_N, documents, dropped

    def add(self, tokens_N: np.ndarray, lengths_D: np.ndarray) -> list[np.ndarray]:
        """Blocks of the documents of these lengths, whose ids are joined in tokens; each block is
        of the same dtype, [L], or [<= L] of "padded"."""
        blocks = self._padded if self._rules.packing == "padded" else self._wrapped
        found = [block for part in blocks(tokens_N, lengths_D) for block in part]
        self.documents += len(lengths_D)
        return found

    def _padded(self, tokens_N: np.ndarray, lengths_D: np.ndarray) -> Iterator[list[np.ndarray]]:
        rules = self._rules
        start, end = (np.array(ids, tokens_N.dtype) for ids in (rules.start, rules.end))
        self.dropped += int(np.maximum(lengths_D - rules.body, 0).sum())
        documents = np.split(tokens_N, np.cumsum(lengths_D)[:-1]) if len(lengths_D) else []
        blocks = (np.concatenate([start, text_N[: rules.body], end]) for text_N in documents)
        yield [block_N for block_N in blocks if len(block_N)]

    def _wrapped(self, tokens_N: np.ndarray, lengths_D: np.ndarray) -> Iterator[np.ndarray]:
        ends_D, position = np.cumsum(lengths_D), 0
        for count in self._group_ends(len(lengths_D)):
            end = int(ends_D[count - 1])
            yield self._cut(tokens_N[position:end])
            self.dropped += len(self.carry_N)
            self.carry_N, position = self.carry_N[:0], end
        yield self._cut(tokens_N[position:])

    def _group_ends(self, count: int) -> range:
        """After how many of the next `count` documents a group is complete."""
        group = self._rules.group
        return range(group - self.documents % group, count + 1, group) if group else range(0)

    def _cut(self, tokens_N: np.ndarray) -> np.ndarray:
        """Blocks [M, L] of what waits and the tokens; the rest waits."""
        rules, stream_N = self._rules, np.concatenate([self.carry_N, tokens_N])
        count = len(stream_N) // rules.body
        self.carry_N = stream_N[count * rules.body :]
        body_ML = stream_N[: count * rules.body].reshape(count, rules.body)
        start, end = (
            np.tile(np.array(i, body_ML.dtype), (count, 1)) for i in (rules.start, rules.end)
        )
        return np.concatenate([start, body_ML, end], axis=1)


def segments(tokens_BL: np.ndarray, separator: int) -> np.ndarray:
    """Which document of its block a position belongs to, int32 [B, L]; a separator to the one that
    it ends."""
    is_end_BL = tokens_BL == separator
    return (np.cumsum(is_end_BL, axis=-1) - is_end_BL).astype(np.int32)
