"""State files as text: read one from the disk without tearing it, and turn YAML or JSON into plain Python values.

`read` and `parse` raise `problems.InvalidInput`; nothing else comes out of them, whatever the bytes are. YAML is read
as a stream of events (libyaml's parser where PyYAML has it), never as objects: no tag can construct anything, no
nesting can exhaust the stack, and aliases are counted as if they were written out. Imports `problems` only.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from controller.problems import InvalidInput, Problem, error

MAX_BYTES: Final = 4 * 1024 * 1024
MAX_NODES: Final = 500_000
MAX_DEPTH: Final = 64
READ_ATTEMPTS: Final = 5
RETRY_DELAY_S: Final = 0.05

# libyaml is ten times as fast; PyYAML may have been built without it.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STRING_TAGS: Final = ("!", "tag:yaml.org,2002:str")
_MAX_DUPLICATES: Final = 100

# YAML 1.2's core schema, less what only surprises in a state file: floats, octal and sexagesimal integers stay text.
_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_PLAIN_SEGMENT: Final = re.compile(r"[\w-]{1,64}")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


def clean(text: str, limit: int = 200) -> str:
    """Text fit for a problem: short, printable ASCII, one line."""
    short = text if len(text) <= limit else text[:limit] + "..."
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], short)


def show(value: object, limit: int = 80) -> str:
    """A value as a problem quotes it, whatever it is."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{clean(value, limit)}'"
    return clean(str(value).lower() if isinstance(value, bool) else str(value), limit)


def join(path: tuple[str | int, ...]) -> str:
    """`("lxc", "containers", 1, "veth")` as `lxc.containers[1].veth`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_SEGMENT.fullmatch(part) and part.isascii():
            text += f".{part}" if text else part
        else:
            text += f"[{show(part, 40)}]"
    return text or "(top level)"


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What must not change about a file while it is read."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> _Stamp:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def read(path: Path) -> str:
    """The text of a state file, as it was at one moment."""
    where = clean(str(path))
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            time.sleep(RETRY_DELAY_S)
        try:
            data = _read_once(path, where)
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
            raise InvalidInput(where, [_unreadable(exc, where)]) from exc
        if data is not None:
            return _decode(data, where)
    raise InvalidInput(
        where,
        [
            error(
                "file-changing",
                where,
                f"the file changed during each of {READ_ATTEMPTS} attempts to read it",
                "a file that holds still",
                "Write it elsewhere and rename it into place, then try again.",
            )
        ],
    )


def _read_once(path: Path, where: str) -> bytes | None:
    """The bytes of the file, or None if it changed (or was replaced) meanwhile."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        before = os.fstat(descriptor)
        if stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError
        if not stat.S_ISREG(before.st_mode):
            fix = "Write the state to a file and name that."
            raise InvalidInput(where, [error("file-kind", where, "not a regular file", "a file", fix)])
        data = file.read(MAX_BYTES + 1)
        after = os.fstat(descriptor)
    if len(data) > MAX_BYTES:
        raise InvalidInput(where, [_too_large(where)])
    try:
        named = os.stat(path)
    except FileNotFoundError:  # between the unlink and the creation of a rewrite
        return None
    stamps = {_Stamp.of(info) for info in (before, after, named)}
    return data if len(stamps) == 1 and len(data) == before.st_size else None


def _unreadable(exc: Exception, where: str) -> Problem:
    if isinstance(exc, FileNotFoundError | NotADirectoryError):
        return error("file-missing", where, "no such file", "a state file", "Check the name and the directory.")
    if isinstance(exc, IsADirectoryError):
        return error("file-kind", where, "a directory", "a state file", "Name the file in it.")
    if isinstance(exc, PermissionError):
        fix = "Give this user read permission on the file and its directories."
        return error("file-permission", where, "permission denied", "a readable file", fix)
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return error("file-unreadable", where, clean(reason), "a readable file", "Mend that and try again.")


def _too_large(where: str) -> Problem:
    expected = f"at most {MAX_BYTES // 1024 // 1024} MiB, {MAX_NODES} values with aliases written out"
    return error("too-large", where, "more than a state file holds", expected, "Is this the right file?")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        found = f"byte 0x{data[exc.start]:02x} in line {line}"
        raise InvalidInput(
            where, [error("file-encoding", where, found, "UTF-8 text", "Save the file as UTF-8.")]
        ) from exc


def _half_a_pair(source: str) -> Problem:
    return error("file-encoding", source, "half of a surrogate pair", "Unicode text", "Remove that character.")


def parse(text: str, source: str) -> tuple[dict[str, Any], list[Problem]]:
    """The mapping that YAML or JSON text holds, and what is wrong with it but did not stop us (duplicate keys)."""
    if len(text) > MAX_BYTES:
        raise InvalidInput(source, [_too_large(source)])
    try:
        if len(text.encode()) > MAX_BYTES:
            raise InvalidInput(source, [_too_large(source)])
    except UnicodeEncodeError as exc:
        raise InvalidInput(source, [_half_a_pair(source)]) from exc
    if not text.strip():
        fix = "Start from examples/oo1424oo.yaml."
        raise InvalidInput(source, [error("file-empty", source, "an empty file", "a mapping of keys", fix)])
    value, found = _read_json_or_yaml(text, source)
    if isinstance(value, dict):
        return value, found
    fix = "The top level holds keys such as networks, openflow and lxc."
    raise InvalidInput(source, [error("not-a-mapping", source, show(value), "a mapping of keys", fix)])


class _NotPlainJson(ValueError):
    """The text is JSON, but with a duplicate key or a number JSON does not have."""


def _read_json_or_yaml(text: str, source: str) -> tuple[Any, list[Problem]]:
    """JSON is tried first where it may be JSON: it is faster, and not quite a subset of YAML.

    The YAML reader knows lines and bounds, so whatever the JSON reader does not like is left to it.
    """
    json_fault = ""
    if text.lstrip()[:1] == "{":
        try:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
            if _SURROGATE.search(text):
                json.dumps(value, ensure_ascii=False).encode()
            return value, []
        except UnicodeEncodeError as exc:
            raise InvalidInput(source, [_half_a_pair(source)]) from exc
        except _NotPlainJson:
            pass
        except json.JSONDecodeError as exc:
            json_fault = f"{exc.msg} in line {exc.lineno}"
        except (ValueError, RecursionError):
            pass
    builder = _Builder(source)
    try:
        return builder.build(yaml.parse(text, Loader=_LOADER)), builder.problems
    except yaml.YAMLError as exc:
        fault = json_fault if json_fault and source.endswith(".json") else _yaml_fault(exc)
        expected = "JSON" if fault is json_fault else "YAML or JSON"
        fix = "Mend the syntax there, or just before it."
        raise InvalidInput(source, [error("syntax", source, clean(fault), expected, fix)]) from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise _NotPlainJson
    return mapping


def _refuse_constant(name: str) -> Any:
    raise _NotPlainJson(name)


def _yaml_fault(exc: Exception) -> str:
    mark = getattr(exc, "problem_mark", None)
    what = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or "not YAML")
    return f"{what} in line {mark.line + 1}" if mark else what


@dataclass(slots=True)
class _Frame:
    """A mapping or list that is being filled. `weight` counts its values with aliases written out."""

    value: dict[str, Any] | list[Any]
    anchor: str | None = None
    key: str | None = None
    weight: int = 1


@dataclass(slots=True)
class _Builder:
    """Builds plain values from YAML events with a stack of its own, and bounds them while it does."""

    source: str
    problems: list[Problem] = field(default_factory=list)
    stack: list[_Frame] = field(default_factory=list)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    documents: int = 0
    weight: int = 0

    def build(self, events: Iterator[Any]) -> Any:
        """The value of the only document."""
        result: Any = None
        for event in events:
            if isinstance(event, yaml.ScalarEvent):
                result = self._add(self._scalar(event), event.anchor, 1, event)
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._open(event)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                frame = self.stack.pop()
                result = self._add(frame.value, frame.anchor, frame.weight, event)
            elif isinstance(event, yaml.AliasEvent):
                result = self._alias(event)
            elif isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    self._refuse("yaml-documents", event, "a second document", "one document", "Split the file.")
        return result

    def _open(self, event: Any) -> None:
        if event.tag is not None:
            self._refuse_tag(event)
        if len(self.stack) >= MAX_DEPTH:
            found = f"more than {MAX_DEPTH} levels of nesting"
            self._refuse("too-deep", event, found, "a state file", "Is this the right file?")
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            self._refuse("bad-key", event, "a mapping or list as a key", "text as a key", "Write a plain key.")
        self._count(1)
        value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.stack.append(_Frame(value, event.anchor))

    def _add(self, value: Any, anchor: str | None, weight: int, event: Any) -> Any:
        """Put a finished value where it belongs; a text where a key is due becomes the key."""
        if anchor is not None:
            self.anchors[anchor] = (value, weight)
        if not isinstance(value, dict | list):
            self._count(1)
        if not self.stack:
            return value
        top = self.stack[-1]
        top.weight += weight
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key is None:
            top.key = self._key(event, value)
            if top.key in top.value:
                self._duplicate(event)
        else:
            top.value[top.key] = value
            top.key = None
        return value

    def _key(self, event: Any, value: Any) -> str:
        # A key is its text, whatever it looks like: `100:` and `true:` are names too.
        text = event.value if isinstance(event, yaml.ScalarEvent) else value
        if not isinstance(text, str):
            self._refuse("bad-key", event, "an alias as a key", "text as a key", "Write a plain key.")
        return str(text)

    def _alias(self, event: Any) -> Any:
        # An anchor is known once its value is complete, so no value can contain itself.
        if event.anchor not in self.anchors:
            found = f"alias {show(event.anchor)} without an anchor before it"
            self._refuse("syntax", event, found, "an anchor that is complete", "Write the value out.")
        value, weight = self.anchors[event.anchor]
        self._count(weight)
        return self._add(value, None, weight, event)

    def _scalar(self, event: Any) -> Any:
        if event.tag is not None and event.tag not in _STRING_TAGS:
            self._refuse_tag(event)
        text: str = event.value
        if not event.implicit[0]:
            return text
        if text in _WORDS:
            return _WORDS[text]
        return int(text) if _INTEGER.fullmatch(text) else text

    def _count(self, weight: int) -> None:
        self.weight += weight
        if self.weight > MAX_NODES:
            raise InvalidInput(self.source, [*self.problems, _too_large(self.source)])

    def _duplicate(self, event: Any) -> None:
        if len(self.problems) >= _MAX_DUPLICATES:
            return
        parts = [len(f.value) if isinstance(f.value, list) else f.key or "" for f in self.stack]
        found = f"the key {show(self.stack[-1].key)} again in line {event.start_mark.line + 1}"
        self.problems.append(
            error("duplicate-key", join(tuple(parts)), found, "each key once", "Remove one of the two.")
        )

    def _refuse_tag(self, event: Any) -> None:
        self._refuse("yaml-tag", event, f"the tag {show(event.tag)}", "plain values", "Remove the tag.")

    def _refuse(self, code: str, event: Any, found: str, expected: str, fix: str) -> None:
        line = event.start_mark.line + 1
        problem = error(code, self.source, f"{found} in line {line}", expected, fix)
        raise InvalidInput(self.source, [*self.problems, problem])
