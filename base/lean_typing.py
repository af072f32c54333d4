# ruff: noqa: ANN001, ANN201  (nobody checks the types of the half that runs)
"""The names of ``typing``, ``collections.abc`` and ``enum`` that the cells use, without importing them.

A cold start imports a hundred modules of ours. ``typing`` costs it as much as a fifth of them, and each class made by
``typing.NamedTuple`` as much as half a module (it compiles source text); annotations are never evaluated here. A type
checker sees the real names. At run time :data:`NamedTuple` and :data:`Enum` make classes that behave the same, the
other names only have to exist.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from enum import Enum
    from typing import Any, Final, Generic, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar
else:
    from _collections import _tuplegetter as field_getter
    from _collections_abc import Callable, Iterable, Iterator, Mapping, Sequence
    from _collections_abc import Set as AbstractSet

    Any = Final = NoReturn = TypeAlias = object

    class Protocol:
        """Base of interfaces that nobody checks at run time."""

    class Generic:
        """Base of classes with type parameters, which mean nothing at run time."""

        def __class_getitem__(cls, _):
            return cls

    def TypeVar(name, *_, **__):
        """A type parameter means nothing at run time."""
        return name

    class _EnumMaker(type):
        """Turns the values of a class body into its members."""

        def __new__(mcs, name, bases, body):
            cls = type.__new__(mcs, name, bases, body)
            cls._members = []
            for key, value in body.items() if bases else ():
                if not key.startswith("_") and not callable(value):
                    member = object.__new__(cls)
                    member.name, member.value = key, value
                    setattr(cls, key, member)
                    cls._members.append(member)
            return cls

        def __iter__(cls):
            return iter(cls._members)

        def __len__(cls):
            return len(cls._members)

        def __call__(cls, value):
            for member in cls._members:
                if member.value == value:
                    return member
            raise ValueError(f"{value!r} is not a valid {cls.__name__}")

    class Enum(metaclass=_EnumMaker):
        """Named values that are only themselves: what the cells need of ``enum.Enum``."""

        def __repr__(self):
            return f"<{type(self).__name__}.{self.name}: {self.value!r}>"

        def __str__(self):
            return f"{type(self).__name__}.{self.name}"

    class Record(tuple):
        """Base of the classes that NamedTuple makes; their methods are those of ``collections.namedtuple``."""

        __slots__ = ()
        _fields = ()
        _field_defaults = {}  # noqa: RUF012

        def __new__(cls, *values, **named):
            if named or len(values) != len(cls._fields):
                values = _complete(cls, values, named)
            return tuple.__new__(cls, values)

        @classmethod
        def _make(cls, values):
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, got {len(made)} values")
            return made

        def _replace(self, /, **changes):
            values = [changes.pop(name, value) for name, value in zip(self._fields, self, strict=True)]
            if changes:
                raise ValueError(f"{type(self).__name__} has no fields {list(changes)}")
            return self._make(values)

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            values = ", ".join([f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True)])
            return f"{type(self).__name__}({values})"

    def _complete(cls, values, named):
        """Return the values in order of the fields; raise TypeError as a call with wrong arguments does."""
        fields = cls._fields
        if len(values) > len(fields):
            raise TypeError(f"{cls.__name__} takes {len(fields)} values, got {len(values)}")
        complete = list(values)
        for name in fields[len(values) :]:
            if name in named:
                complete.append(named.pop(name))
            elif name in cls._field_defaults:
                complete.append(cls._field_defaults[name])
            else:
                raise TypeError(f"{cls.__name__} lacks the value of {name!r}")
        if named:
            raise TypeError(f"{cls.__name__} has no field {next(iter(named))!r}, or got it twice")
        return complete

    class _Maker(type):
        """Turns the body of a class that names NamedTuple as its base into a subclass of Record."""

        def __new__(mcs, name, bases, body):
            if not bases:
                return type.__new__(mcs, name, bases, body)
            fields = tuple(body.get("__annotations__", ()))
            defaults = {}
            for number, field in enumerate(fields):
                if field in body:
                    defaults[field] = body[field]
                elif defaults:
                    raise TypeError(f"{name}.{field} has no default but follows a field that has one")
                body[field] = field_getter(number, f"Field {number}")
            body.update(_fields=fields, _field_defaults=defaults, __match_args__=fields, __slots__=())
            return type.__new__(type, name, (Record,), body)

    class NamedTuple(metaclass=_Maker):
        """``class Name(NamedTuple)`` with annotated fields, as in ``typing``."""


__all__ = [
    "TYPE_CHECKING", "AbstractSet", "Any", "Callable", "Enum", "Final", "Generic", "Iterable", "Iterator", "Mapping",
    "NamedTuple", "NoReturn", "Protocol", "Sequence", "TypeAlias", "TypeVar",
]  # fmt: skip
