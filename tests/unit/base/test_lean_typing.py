"""Our NamedTuple next to the one of typing: the same behaviour, seen from outside."""

from __future__ import annotations

import enum
import pickle
import typing
from typing import Any

import pytest

from base import lean_typing


def make(base: Any) -> Any:
    """The same class twice, on either base."""
    if base is lean_typing.NamedTuple:

        class Point(lean_typing.NamedTuple):
            """A point."""

            x: int
            y: int
            name: str = "here"

            @property
            def both(self) -> tuple[int, int]:
                return self.x, self.y

            def moved(self, by: int) -> Point:
                return self._replace(x=self.x + by)

        return Point

    class Point(typing.NamedTuple):  # type: ignore[no-redef]
        """A point."""

        x: int
        y: int
        name: str = "here"

        @property
        def both(self) -> tuple[int, int]:
            return self.x, self.y

        def moved(self, by: int) -> Any:
            return self._replace(x=self.x + by)

    return Point


PAIR = [make(lean_typing.NamedTuple), make(typing.NamedTuple)]


def outcome(action: Any, record: Any) -> Any:
    """What an action on the class gives: a value, or the type of the exception."""
    try:
        return action(record)
    except (TypeError, ValueError, AttributeError) as error:
        return type(error)


ACTIONS = {
    "positions": lambda p: p(1, 2, "a"),
    "default": lambda p: p(1, 2),
    "names": lambda p: p(y=1, x=2),
    "mixed": lambda p: p(1, name="z", y=3),
    "too few": lambda p: p(1),
    "too many": lambda p: p(1, 2, "a", 4),
    "twice": lambda p: p(1, 2, x=3),
    "unknown name": lambda p: p(1, 2, z=3),
    "make": lambda p: p._make([1, 2, "a"]),
    "make too few": lambda p: p._make([1, 2]),
    "replace": lambda p: p(1, 2)._replace(name="b", x=9),
    "replace unknown": lambda p: p(1, 2)._replace(z=1),
    "asdict": lambda p: p(1, 2)._asdict(),
    "repr": lambda p: repr(p(1, 2)),
    "fields": lambda p: p._fields,
    "field defaults": lambda p: p._field_defaults,
    "match arguments": lambda p: p.__match_args__,
    "equal to a tuple": lambda p: p(1, 2) == (1, 2, "here"),
    "hash": lambda p: hash(p(1, 2)),
    "order": lambda p: sorted([p(2, 1), p(1, 9)]),
    "field": lambda p: p(1, 2).y,
    "property": lambda p: p(1, 2).both,
    "method": lambda p: p(1, 2).moved(3),
    "set field": lambda p: setattr(p(1, 2), "x", 3),
    "set other": lambda p: setattr(p(1, 2), "other", 3),
    "no dictionary": lambda p: hasattr(p(1, 2), "__dict__"),
    "is a tuple": lambda p: isinstance(p(1, 2), tuple),
    "metaclass": type,
    "bases": lambda p: issubclass(p, tuple),
    "doc": lambda p: p.__doc__,
    "name": lambda p: p.__name__,
    "annotations": lambda p: set(p.__annotations__),
    "unpack": lambda p: [*p(1, 2)],
    "index": lambda p: p(1, 2)[1:],
    "copy arguments": lambda p: p(1, 2).__getnewargs__(),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_it_behaves_as_the_one_of_typing(name):
    ours, theirs = (outcome(ACTIONS[name], record) for record in PAIR)
    assert ours == theirs
    assert type(ours) is type(theirs) or (isinstance(ours, tuple) and isinstance(theirs, tuple))


def test_a_default_before_a_field_without_one_is_refused():
    with pytest.raises(TypeError):

        class Wrong(lean_typing.NamedTuple):
            x: int = 1
            y: int  # type: ignore[misc]


def test_a_record_can_be_copied_by_pickle():
    assert pickle.loads(pickle.dumps(Global(1, "a"))) == Global(1, "a")


class Global(lean_typing.NamedTuple):
    """Found by pickle."""

    number: int
    text: str


def colours(base: Any) -> Any:
    class Colour(base):  # type: ignore[misc]
        """Values with names."""

        RED = "red"
        BLUE = "blue"

        def loud(self):
            return self.name + "!"

    return Colour


ENUM_ACTIONS = {
    "value": lambda e: e.RED.value,
    "name": lambda e: e.BLUE.name,
    "members": lambda e: [each.name for each in e],
    "number": len,
    "by value": lambda e: e("red") is e.RED,
    "by wrong value": lambda e: e("green"),
    "identity": lambda e: e.RED is e.RED and e.RED is not e.BLUE,
    "equality": lambda e: (e.RED == e.RED, e.RED == e.BLUE, e.RED == "red"),
    "hash": lambda e: len({e.RED, e.BLUE, e.RED}),
    "text": lambda e: (str(e.RED), repr(e.RED), f"{e.RED}"),
    "method": lambda e: e.RED.loud(),
    "instance": lambda e: isinstance(e.RED, e),
    "doc": lambda e: e.__doc__,
}


@pytest.mark.parametrize("name", ENUM_ACTIONS)
def test_an_enumeration_behaves_as_the_one_of_enum(name):
    ours, theirs = (outcome(ENUM_ACTIONS[name], colours(base)) for base in (lean_typing.Enum, enum.Enum))
    assert ours == theirs
