"""Coordinates in text: boxes and points as integers 0 … 999 of the frame, and their tokens.

    "[412,98,640,233]"   digits      [ 4 1 2 , 9 8 , 6 4 0 , 2 3 3 ]     Emu3's text vocabulary
                         locations   [ <loc412> <loc098> <loc640> <loc233> ]   one id a number

The text is the same for every vocabulary: a box "[x1,y1,x2,y2]", a point "[x,y]", several one
behind the other, "none" where there is nothing. A text tokenizer that was fitted with
``location_symbols`` writes a number as one id, any other by its digits. Bins are those of Qwen-VL
(github.com/QwenLM/Qwen-VL README.md), values divided by 999.

Axes: N numbers of a place (4 of a box, 2 of a point).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from univla_jax.errors import UserError
from univla_jax.tokenizers.text import TextTokenizer

BINS = 1000
NONE = "none"
Place = tuple[float, ...]
"""A box (x1, y1, x2, y2) or a point (x, y), 0 … 1 of the frame's width and height."""

_OPEN, _CLOSE, _COMMA = "[", "]", ","
_SPAN = re.compile(r"\[\d{1,3}(?:,\d{1,3})*\]")
_LOCATION = re.compile(r"<loc(\d{3})>")


def location_symbols() -> tuple[str, ...]:
    """What a text tokenizer gets one id each for, so that a number is one token."""
    return (_OPEN, _CLOSE, NONE, *map(_symbol, range(BINS)))


def _symbol(number: int) -> str:
    return f"<loc{number:03d}>"


def to_bins(place: Place) -> tuple[int, ...]:
    """The integers 0 … 999 of a place; a box keeps at least one bin between its sides.

    Raises:
      UserError: neither a box nor a point, a value outside 0 … 1, or sides in the wrong order.
    """
    if len(place) not in (2, 4) or not all(0 <= v <= 1 for v in place):
        raise UserError(f"place {tuple(place)}: expected 2 or 4 numbers of 0 … 1")
    bins = [round(v * (BINS - 1)) for v in place]
    for low, high in ((0, 2), (1, 3)) if len(bins) == 4 else ():
        if place[low] > place[high]:
            raise UserError(f"box {tuple(place)}: its sides are in the wrong order")
        if bins[low] == bins[high]:
            bins[low] = min(bins[low], BINS - 2)
            bins[high] = bins[low] + 1
    return tuple(bins)


def from_bins(bins: Sequence[int]) -> Place:
    """The place, 0 … 1, of integers 0 … 999."""
    return tuple(n / (BINS - 1) for n in bins)


def places_text(places: Sequence[Place]) -> str:
    """The text of boxes or points, in the order of x and then y; "none" of none."""
    spans = sorted(to_bins(place) for place in places)
    return "".join(f"[{','.join(map(str, bins))}]" for bins in spans) or NONE


def parse_places(text: str, size: int | None = None) -> list[Place] | None:
    """The places that a text says, none for "none"; None where it says anything else.

    Args:
      text: a whole answer.
      size: numbers N of each place; 4 or 2, either by default.
    """
    text = text.strip()
    if text == NONE:
        return []
    spans = _SPAN.findall(text)
    if not spans or "".join(spans) != text:
        return None
    found = [tuple(int(n) for n in span[1:-1].split(",")) for span in spans]
    sizes = {len(bins) for bins in found}
    if len(sizes) != 1 or sizes.pop() not in ((2, 4) if size is None else (size,)):
        return None
    if any(len(b) == 4 and (b[0] >= b[2] or b[1] >= b[3]) for b in found):
        return None
    return [from_bins(bins) for bins in found]


def find_places(text: str) -> list[Place]:
    """All places inside a text, such as a thought; those that are no place are left out."""
    found = (parse_places(span) for span in _SPAN.findall(text))
    return [place for places in found if places for place in places]


def without_places(text: str) -> str:
    """A text without the coordinates in it."""
    return _SPAN.sub("", text)


class CoordinateEncoder:
    """Texts with coordinates to ids and back, with the numbers as the tokenizer has them.

    Attributes:
      has_locations: whether a number is one id.
    """

    def __init__(self, text: TextTokenizer) -> None:
        """Takes the text tokenizer of a model."""
        self._text = text
        symbol = text.encode(_symbol(0))
        self.has_locations = len(symbol) == 1 and text.decode(symbol) == _symbol(0)

    def encode(self, text: str) -> np.ndarray:
        """int32 [n] ids; "[…]" of integers below 1000 as coordinates, the rest as plain text."""
        ids: list[int] = []
        end = 0
        for span in _SPAN.finditer(text):
            ids += self._text.encode(text[end : span.start()]) if span.start() > end else []
            ids += self._span_ids([int(n) for n in span[0][1:-1].split(",")])
            end = span.end()
        ids += self._text.encode(text[end:]) if end < len(text) else []
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, numbers in digits."""
        text = self._text.decode([int(i) for i in ids])
        if not self.has_locations:
            return text
        runs = re.compile(rf"(?:{_LOCATION.pattern})+")
        return runs.sub(lambda run: ",".join(str(int(n)) for n in _LOCATION.findall(run[0])), text)

    def _span_ids(self, numbers: Sequence[int]) -> list[int]:
        ids = list(self.open_ids)
        for i, number in enumerate(numbers):
            ids += (*self.number_ids(number), *(self.comma_ids if i + 1 < len(numbers) else ()))
        return [*ids, *self.close_ids]

    @functools.cached_property
    def open_ids(self) -> tuple[int, ...]:
        """Ids before the first number."""
        return tuple(self._text.encode(_OPEN))

    @functools.cached_property
    def close_ids(self) -> tuple[int, ...]:
        """Ids after the last number."""
        return tuple(self._text.encode(_CLOSE))

    @functools.cached_property
    def comma_ids(self) -> tuple[int, ...]:
        """Ids between two numbers; none where a number is one id."""
        return () if self.has_locations else tuple(self._text.encode(_COMMA))

    @functools.cached_property
    def none_ids(self) -> tuple[int, ...]:
        """Ids that say that there is nothing."""
        return tuple(self._text.encode(NONE))

    def number_ids(self, number: int) -> tuple[int, ...]:
        """Ids of one number."""
        return self._numbers[number]

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """int32 [n] all ids that places are written with, ascending."""
        marks = (self.open_ids, self.close_ids, self.comma_ids, self.none_ids, *self._numbers)
        return np.unique(np.concatenate([np.asarray(m, np.int32) for m in marks]))

    @functools.cached_property
    def _numbers(self) -> list[tuple[int, ...]]:
        spell = _symbol if self.has_locations else str
        return [tuple(self._text.encode(spell(n))) for n in range(BINS)]


class PlaceGrammar:
    """Which id may come next in an answer that is places or "none"; one object per vocabulary.

    Attributes:
      stop_id: ends the answer.
      max_new_tokens: the most ids of an answer, the stop id included.

    A state is a place in the automaton and the ids since it was reached. Sequences out of a place
    are prefix-free: a number in digits ends with its comma or bracket.
    """

    def __init__(
        self, encoder: CoordinateEncoder, size: int, stop_id: int, *, most: int = 1
    ) -> None:
        """Makes the grammar.

        Args:
          encoder: of the vocabulary.
          size: numbers of a place: 4 of a box, with x1 < x2 and y1 < y2; 2 of a point.
          stop_id: ends the answer.
          most: places.
        """
        self._encoder, self._size, self.stop_id, self._most = encoder, size, stop_id, most
        self._ways = functools.lru_cache(256)(self._find_ways)
        self._next = functools.lru_cache(4096)(self._find_next)
        longest = max(len(encoder.number_ids(n)) for n in (0, BINS - 1))
        span = len(encoder.open_ids) + len(encoder.close_ids) + size * (longest + 1)
        self.max_new_tokens = max(most * span, len(encoder.none_ids)) + 1

    def ending_with(self, stop_id: int) -> PlaceGrammar:
        """The same with another stop id."""
        return PlaceGrammar(self._encoder, self._size, stop_id, most=self._most)

    initial_state: tuple = (("start",), ())

    def allowed(self, state: tuple) -> np.ndarray:
        """int32 [n] ids, ascending, that may follow; none behind the stop id."""
        return self._next(*state)

    def next_state(self, state: tuple, chosen: int) -> tuple:
        """The state after an allowed id."""
        node, partial = state
        partial = (*partial, int(chosen))
        ways = self._ways(node)
        return (ways[partial], ()) if partial in ways else (node, partial)

    def _find_next(self, node: tuple, partial: tuple[int, ...]) -> np.ndarray:
        n = len(partial)
        ids = {way[n] for way in self._ways(node) if way[:n] == partial and len(way) > n}
        return np.array(sorted(ids), np.int32)

    def _find_ways(self, node: tuple) -> dict[tuple[int, ...], tuple]:
        """Sequences of ids out of a place of the automaton, and where each leads."""
        kind, *rest = node
        encoder = self._encoder
        if kind == "start":
            return {encoder.none_ids: ("after", self._most), encoder.open_ids: ("number", 1)}
        if kind == "after":
            (count,) = rest
            ways: dict[tuple[int, ...], tuple] = {(self.stop_id,): ("done",)}
            return ways | ({encoder.open_ids: ("number", count + 1)} if count < self._most else {})
        if kind == "done":
            return {}
        count, *numbers = rest
        index, last = len(numbers), len(numbers) + 1 == self._size
        low, high = 0, BINS - 1
        if self._size == 4:
            low, high = (0, BINS - 2) if index < 2 else (numbers[index - 2] + 1, BINS - 1)
        ending = encoder.close_ids if last else encoder.comma_ids
        # A box remembers its first corner alone, so that few places are remembered.
        return {
            (*encoder.number_ids(n), *ending): ("after", count) if last else (*node, n)
            for n in range(low, high + 1)
        }
