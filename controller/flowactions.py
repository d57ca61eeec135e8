"""What stands behind `actions=` in a flow's text, as action values (`ovs-actions(7)`).

No action is ever left out. What we cannot say exactly becomes `Raw` with its text, for which the prover lets a packet
go anywhere; what provably changes neither a packet nor its way becomes `Aside`. Imports flownames, flowmatch,
flowwrites and flow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from controller import fields
from controller.flow import (
    DELETE_LEARNED,
    SEND_FLOW_REM,
    Action,
    Aside,
    Bits,
    Clone,
    Ct,
    CtClear,
    DecTtl,
    Learn,
    LearnLoad,
    LearnMatch,
    LearnOutput,
    LearnSpec,
    Load,
    Match,
    Move,
    Output,
    PopVlan,
    Raw,
    Resubmit,
    SetField,
)
from controller.flowmatch import DEFAULT_PRIORITY, IP, IPV6, Head, transport
from controller.flownames import (
    NAMES,
    PORT_WORDS,
    Refused,
    bits,
    close,
    field,
    ipv4,
    is_number,
    mac,
    number,
    port,
    value_and_mask,
)
from controller.flowwrites import FOLLOWED, masked, moved, note, paired, written

DEEPEST: Final = 32
"""So many actions inside each other are read. Open vSwitch has a limit as well, and nobody writes ten."""
_LEARN_TABLE: Final = 1

_KEY: Final = re.compile(r'"(?:[^"\\]|\\.)*+"?|[^\s,:=("]+', re.S)
_GAP: Final = re.compile(r"[\s,]*")
_BRACKETS: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|[()]', re.S)
_ENDS: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|[(),\s]', re.S)
_DOTTED_BYTES: Final = re.compile(r"(?:[0-9a-fA-F]{1,2}(?:\.[0-9a-fA-F]{1,2})*\.?)?")

_RAW: Final = frozenset((
    "group", "bundle", "bundle_load", "multipath", "conjunction", "check_pkt_larger", "sample", "exit", "fin_timeout",
    "encap", "decap", "delete_field", "push", "pop", "stack_push", "stack_pop", "push_mpls", "pop_mpls",
    "set_mpls_label", "set_mpls_tc", "set_mpls_ttl", "dec_mpls_ttl", "dec_nsh_ttl", "write_actions", "copy_ttl_in",
    "copy_ttl_out", "push_pbb", "pop_pbb", "debug_recirc", "debug_slow", "unroll_xlate",
))  # fmt: skip


class Word(NamedTuple):
    """One action as it is written: its name, what separates that from the argument, the argument, and `->FIELD`."""

    name: str
    separator: str
    argument: str
    target: str = ""

    @property
    def text(self) -> str:
        """As it was written."""
        if self.separator == "(":
            return f"{self.name}({self.argument}){self.target}"
        return f"{self.name}{self.separator}{self.argument}"


def words(text: str) -> Iterator[Word]:
    """A list of actions, or of arguments, cut into its words. Commas and spaces separate outside parentheses."""
    at = 0
    while True:
        gap = _GAP.match(text, at)
        at = gap.end() if gap else at
        if at >= len(text):
            return
        key = _KEY.match(text, at)
        if key is None:
            raise Refused(text[at : at + 40], "an action", "Separate actions with commas; see ovs-actions(7).")
        at = key.end()
        separator = text[at : at + 1]
        if separator == "(":
            start, at = at + 1, _closing(text, at)
            argument = text[start:at]
            target, at = at + 1, _end(text, at + 1)
            if target != at and key[0].lower() != "check_pkt_larger":
                raise Refused(text[target - 1 : at][:40], "nothing behind a parenthesis", "Put a comma there.")
            yield Word(key[0], "(", argument, text[target:at])
        elif separator and separator in ":=":
            start, at = at + 1, _end(text, at + 1)
            yield Word(key[0], separator, text[start:at])
        else:
            yield Word(key[0], "", "")


def _closing(text: str, at: int) -> int:
    depth = 0
    for found in _BRACKETS.finditer(text, at):
        if found[0] == "(":
            depth += 1
        elif found[0] == ")":
            depth -= 1
            if not depth:
                return found.start()
    raise Refused(text[at : at + 40], "a closing parenthesis", "Close it.")


def _end(text: str, at: int) -> int:
    depth = 0
    for found in _ENDS.finditer(text, at):
        if found[0] == "(":
            depth += 1
        elif found[0] == ")":
            depth -= 1
            if depth < 0:
                raise Refused(text[at : at + 40], "no parenthesis that was not opened", "Remove it.")
        elif not depth and not found[0].startswith('"'):
            return found.start()
    if depth:
        raise Refused(text[at : at + 40], "a closing parenthesis", "Close it.")
    return len(text)


class ActionReader:
    """Reads the actions of one flow; `head` tells what its match says of the protocol and the VLAN tag."""

    def __init__(self, head: Head, ports: Mapping[str, int]) -> None:
        self.ports = ports
        self.protocol = head.protocol
        self.tagged = _tagged(head.match)
        self.table = head.table
        self.goto: int | None = None

    def read(self, text: str) -> tuple[tuple[Action, ...], int | None]:
        """The actions, and the table of `goto_table`."""
        found = self._list(text, 0)
        return tuple(found), self.goto

    def _list(self, text: str, depth: int) -> list[Action]:
        if depth > DEEPEST:
            raise Refused("(" * 8 + "...", f"at most {DEEPEST} actions inside each other", "Use tables instead.")
        out: list[Action] = []
        dropped, last = False, ""
        count = 0
        behind: int | None = None
        for word in words(text):
            count += 1
            if self.goto is not None:
                raise Refused(f"goto_table:{self.goto},{word.text}", "goto_table last", "Put it behind all the others.")
            if word.name.lower() == "drop" and not word.separator:
                dropped = True
                continue
            found = self._action(word, depth)
            if word.name.lower() in ("write_metadata", "clear_actions", "write_actions"):
                last = word.name
            elif last and self.goto is None:
                raise Refused(f"{last} before {word.text}", "instructions behind actions", f"Put {last} behind them.")
            if word.name.lower() == "write_metadata" and behind is not None:
                # Written as an action, it goes before what is only done at the very end.
                out[behind:behind] = found
                behind += len(found)
            else:
                behind = len(out) if last and behind is None and word.name.lower() != "write_metadata" else behind
                out += found
            self._follow(found)
        if dropped and count > 1:
            raise Refused(f"drop beside other actions: {text}", "drop on its own", "Remove drop, or the others.")
        return out

    def _follow(self, done: list[Action]) -> None:
        """Whether the packet has a VLAN tag from here on, None where that is not known."""
        for action in done:
            match action:
                case Output() | Aside() | CtClear() | DecTtl() | Learn() | Clone():
                    pass
                case SetField(header) | Load(target=Bits(header)) | Move(target=Bits(header)) if header not in _TAG:
                    pass
                case SetField(fields.VLAN_VID.header, value):
                    self.tagged = bool(value & _TAG_BIT)
                case SetField(fields.VLAN_PCP.header) | Load(1, Bits(fields.VLAN_VID.header, 12, 1)):
                    self.tagged = self.tagged or None
                case _:
                    self.tagged = None

    def _action(self, word: Word, depth: int) -> list[Action]:
        name = word.name.lower()
        if name in ("clone", "ct") and word.separator in ("(", ""):
            return [self._clone(word, depth) if name == "clone" else self._ct(word, depth)]
        reader = _READERS.get(name)
        if reader is not None:
            return reader(self, word)
        if name in _RAW:
            return [Raw(text=word.text)]
        if word.separator:
            raise self._unknown(word)
        if word.name.startswith('"') or is_number(word.name) or name in PORT_WORDS:
            return [self._to(word.name)]
        try:
            return [_output(self.ports[word.name])]
        except KeyError:
            raise self._unknown(word) from None

    def _unknown(self, word: Word) -> Refused:
        near = close(word.name.lower(), (*_READERS, *_RAW, "clone", "ct", "drop", *self.ports))
        fix = f"{near}See ovs-actions(7); give a port by its number where no map names it."
        return Refused(word.text, "an action or a port of the bridge", fix, "unknown-action")

    # ------------------------------------------------------------------------------------------------ where packets go

    def _output(self, word: Word) -> list[Action]:
        where = word.argument
        if word.separator == "(":
            options = {option.name: option.argument for option in words(where)}
            if set(options) == {"port", "max_len"}:
                size = number("max_len", options["max_len"], 0xFFFFFFFF, 14)
                return [Output(port(options["port"], self.ports), size)]
        if "[" in where and not where.startswith('"'):
            return [Raw(text=f"output:{bits(where)}")]
        if not where:
            raise Refused(word.text, "a port", "Say where to: output:PORT.")
        return [self._to(where)]

    def _to(self, where: str) -> Action:
        """TABLE starts anew in the first table, and other reserved numbers are nothing that we follow."""
        number = port(where, self.ports)
        return Raw(text=f"output:{where}") if number >= fields.RESERVED and number not in FOLLOWED else _output(number)

    def _controller(self, word: Word) -> list[Action]:
        if word.separator != "(":
            size = number("max_len", word.argument, 0xFFFF) if word.separator else 0xFFFF
            return [Output(fields.CONTROLLER, size)]
        options = {option.name: option.argument for option in words(word.argument)}
        if "pause" in options:
            return [Raw(text=word.text)]
        if set(options) <= {"max_len", "reason"} and options.get("reason", "action") == "action":
            return [Output(fields.CONTROLLER, number("max_len", options.get("max_len", "65535"), 0xFFFF))]
        return [Aside(word.text)]

    def _enqueue(self, word: Word) -> list[Action]:
        where, _, queue = word.argument.replace(",", ":").rpartition(":")
        number("queue", queue.strip(), 0xFFFFFFFF)
        return [Aside(f"set_queue:{int(queue, 0)}"), self._to(where.strip()), Aside("pop_queue")]

    def _resubmit(self, word: Word) -> list[Action]:
        parts = [part.strip() for part in word.argument.split(",")] if word.separator == "(" else [word.argument]
        if not word.separator or len(parts) > 3 or not any(parts[:2]):
            raise Refused(word.text, "resubmit(,TABLE) or resubmit(PORT,TABLE)", "Say which table to look in.")
        inport = "" if parts[0].lower() == "in_port" else parts[0]
        table = parts[1] if len(parts) > 1 else ""
        to = number("table", table, 254) if table else None
        if inport:
            where = port(inport, self.ports)
            return [Raw(text=f"resubmit:{where}" if to is None else f"resubmit({where},{to})")]
        if to is None:
            return [Raw(text="resubmit:IN_PORT")]
        return [Resubmit(to)] if len(parts) < 3 else [Raw(text=f"resubmit(,{to},{parts[2]})")]

    def _goto(self, word: Word) -> list[Action]:
        self.goto = number("goto_table", word.argument, 254)
        if self.goto <= self.table:
            raise Refused(word.text, f"a table after {self.table}", "goto_table only goes on; resubmit may go back.")
        return []

    def _clone(self, word: Word, depth: int) -> Action:
        tagged, goto = self.tagged, self.goto
        inner = self._list(word.argument, depth + 1)
        self.tagged = tagged
        if self.goto != goto:
            raise Refused(word.text, "no goto_table inside clone", "Use resubmit.")
        return Clone(tuple(inner))

    def _ct(self, word: Word, depth: int) -> Action:
        zone: int | Bits = 0
        table, nat, inner = None, "", []
        flags = set()
        for part in words(word.argument):
            name = part.name
            if name in ("commit", "force") and not part.separator:
                flags.add(name)
            elif name == "table":
                table = number("table", part.argument, 254)
            elif name == "zone":
                zone = number("zone", part.argument, 0xFFFF) if is_number(part.argument) else bits(part.argument)
                if isinstance(zone, Bits):
                    if zone.width > 16:
                        raise Refused(part.text, "a zone of 16 bits", "Name bits of a register: reg0[0..15].")
                    zone = _one_part(zone, part.text)
            elif name == "nat" and part.separator in ("", "("):
                nat = part.text
            elif name == "exec" and part.separator == "(":
                inner = self._list(part.argument, depth + 1)
            elif name == "alg":
                return Raw(text=word.text)  # it lets connections in that are related to this one
            else:
                raise Refused(part.text, "commit, force, table, zone, nat, exec or alg", "See ovs-actions(7) on ct.")
        return Ct(zone, table, "commit" in flags, "force" in flags, nat, tuple(inner))

    # ---------------------------------------------------------------------------------------------- what packets become

    def _set_field(self, word: Word) -> list[Action]:
        text, arrow, name = word.argument.rpartition("->")
        if not arrow:
            raise Refused(word.text, "set_field:VALUE->FIELD", "Say which field to write.")
        of = field(name)
        if of in (fields.IN_PORT_16, fields.IN_PORT_FIELD):
            return [SetField(of.header, port(text, self.ports) & of.full)]
        value, mask = value_and_mask(of, name, text)
        if mask == 0:
            return [Aside(word.text)]
        return masked(of, value, mask) or [Raw(text=word.text)]

    def _load(self, word: Word) -> list[Action]:
        text, arrow, name = word.argument.rpartition("->")
        if not arrow:
            raise Refused(word.text, "load:VALUE->FIELD[BITS]", "Say which bits to write.")
        target = bits(name)
        value = number("load", text, (1 << target.width) - 1)
        return written(target, value) or [Raw(text=word.text)]

    def _move(self, word: Word) -> list[Action]:
        source, arrow, target = word.argument.partition("->")
        one, other = bits(source), bits(target) if arrow else None
        if other is None or one.width != other.width:
            raise Refused(word.text, "move:FIELD[BITS]->FIELD[BITS], as many bits on both sides", "Name both.")
        return moved(one, other) or [Raw(text=f"move:{one}->{other}")]

    def _write_metadata(self, word: Word) -> list[Action]:
        value, mask = value_and_mask(fields.METADATA, "write_metadata", word.argument)
        return (masked(fields.METADATA, value, mask) or []) if mask else [Aside(word.text)]

    def _set_tunnel(self, word: Word) -> list[Action]:
        return [SetField(fields.TUNNEL_ID.header, number(word.name, word.argument, fields.TUNNEL_ID.full))]

    def _mod_mac(self, word: Word) -> list[Action]:
        of = fields.ETH_SRC if word.name.lower().endswith("src") else fields.ETH_DST
        return [SetField(of.header, mac(word.name, word.argument))]

    def _mod_ip(self, word: Word) -> list[Action]:
        of = fields.IPV4_SRC if word.name.lower().endswith("src") else fields.IPV4_DST
        address = ipv4(word.name, word.argument)
        return [SetField(of.header, address)] if self.protocol[0] == IP else [Raw(text=word.text)]

    def _mod_transport(self, word: Word) -> list[Action]:
        value = number(word.name, word.argument, 0xFFFF)
        pair = transport(self.protocol)
        of = pair[word.name.lower().endswith("dst")] if pair else None
        return [SetField(of.header, value)] if of is not None and of.bits == 16 else [Raw(text=word.text)]

    def _mod_ip_word(self, word: Word) -> list[Action]:
        of, highest, shift = {
            "mod_nw_tos": (fields.IP_DSCP, 255, 2),
            "mod_nw_ecn": (fields.IP_ECN, 3, 0),
            "mod_nw_ttl": (fields.IP_TTL, 255, 0),
        }[word.name.lower()]
        value = number(word.name, word.argument, highest) >> shift
        return [SetField(of.header, value)] if self.protocol[0] in (IP, IPV6) else [Raw(text=word.text)]

    def _mod_vlan(self, word: Word) -> list[Action]:
        """Both give a packet a tag that has none."""
        if word.name.lower().endswith("vid"):
            return [SetField(fields.VLAN_VID.header, _TAG_BIT | number(word.name, word.argument, 0xFFF))]
        pcp = SetField(fields.VLAN_PCP.header, number(word.name, word.argument, 7))
        return [pcp] if self.tagged else [Load(1, Bits(fields.VLAN_VID.header, 12, 1)), pcp]

    def _push_vlan(self, word: Word) -> list[Action]:
        """Exact only for a packet without a tag: an inner tag we do not follow."""
        kind = number(word.name, word.argument, 0xFFFF)
        if kind == 0x8100 and self.tagged is False:
            return [SetField(fields.VLAN_VID.header, _TAG_BIT)]
        return [Raw(text=f"push_vlan:{kind:#06x}")]

    # -------------------------------------------------------------------------------------------------------- the rest

    def _bare(self, word: Word) -> list[Action]:
        name = word.name.lower()
        if word.separator and word.argument.strip():
            if name == "dec_ttl":
                return [Raw(text=word.text)]  # it tells controllers of our choice
            raise Refused(word.text, f"{word.name} without an argument", f"Write just {word.name}.")
        made: dict[str, Action] = {"dec_ttl": DecTtl(), "ct_clear": CtClear()}
        return [made.get(name) or (Aside(name) if name in ("pop_queue", "clear_actions") else PopVlan())]

    def _numbered_aside(self, word: Word) -> list[Action]:
        value = number(word.name, word.argument, 0xFFFFFFFF)
        return [Aside(f"{word.name.lower()}:{value}")]

    def _note(self, word: Word) -> list[Action]:
        """Padded, as Open vSwitch sends and shows it."""
        if not _DOTTED_BYTES.fullmatch(word.argument):
            raise Refused(word.text, "note:HEX.HEX...", "Write bytes as hexadecimal digits, with dots between them.")
        return [note(bytes(int(byte, 16) for byte in word.argument.split(".") if byte))]

    def _learn(self, word: Word) -> list[Action]:
        learn = _LearnReader(self.ports)
        for part in words(word.argument):
            if part.name == "result_dst":
                return [Raw(text=word.text)]  # it writes a bit of the packet
            learn.take(part)
        return [learn.done()]


_TAG: Final = frozenset((fields.VLAN_VID.header, fields.VLAN_PCP.header))


_TAG_BIT: Final = 0x1000
"""Of the 13 bits of a VLAN id: there is a tag."""


def _tagged(match: Match) -> bool | None:
    value, mask = match.get(fields.VLAN_VID) or (0, 0)
    return bool(value & _TAG_BIT) if mask & _TAG_BIT else None


def _output(number: int) -> Output:
    return Output(number, 0xFFFF if number == fields.CONTROLLER else 0)


def _one_part(source: Bits, text: str) -> Bits:
    pieces = fields.parts(*source)
    if len(pieces) != 1:
        raise Refused(text, "bits of one register", "Name a register of 32 bits.")
    return Bits(*pieces[0])


_TIMES: Final = {
    "idle_timeout": 0xFFFF, "hard_timeout": 0xFFFF, "fin_idle_timeout": 0xFFFF, "fin_hard_timeout": 0xFFFF,
    "priority": 0xFFFF, "cookie": (1 << 64) - 1, "table": 254, "limit": 0xFFFFFFFF,
}  # fmt: skip


class _LearnReader:
    """Collects the words of one learn action."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self.ports = ports
        self.settings = {"table": _LEARN_TABLE, "priority": DEFAULT_PRIORITY}
        self.flags = 0
        self.specs: list[LearnSpec] = []

    def take(self, word: Word) -> None:
        """One setting, or one thing that the learned flow matches or does."""
        name = word.name
        if name in _TIMES:
            self.settings[name] = number(name, word.argument, _TIMES[name])
        elif name in ("send_flow_rem", "delete_learned"):
            self.flags |= SEND_FLOW_REM if name == "send_flow_rem" else DELETE_LEARNED
        elif name == "load":
            self._load(word)
        elif name == "output":
            self.specs.append(LearnOutput(_one_part(bits(word.argument), word.text)))
        else:
            self._match(word)

    def _load(self, word: Word) -> None:
        text, arrow, name = word.argument.rpartition("->")
        if not arrow:
            raise Refused(word.text, "load:VALUE->FIELD[BITS]", "Say which bits the learned flow writes.")
        target = bits(name)
        if is_number(text):
            self._constant(LearnLoad, target, number("load", text, (1 << target.width) - 1))
        else:
            self._copy(LearnLoad, bits(text), target, word)

    def _match(self, word: Word) -> None:
        target = bits(word.name)
        text = word.argument
        if not word.separator:
            self._copy(LearnMatch, target, target, word)
        elif (of := fields.by_header(target.header)) in (fields.IN_PORT_16, fields.IN_PORT_FIELD) and "[" not in text:
            if text in NAMES and text.lower() not in PORT_WORDS:
                self._copy(LearnMatch, bits(text), target, word)
            else:
                self._constant(LearnMatch, target, port(text, self.ports) & of.full)
        elif text.partition("[")[0] in NAMES:
            self._copy(LearnMatch, bits(text), target, word)
        elif target.width == of.bits:
            value, mask = value_and_mask(of, word.name, text)
            if mask != of.full:
                raise Refused(word.text, "a value without a mask", "A learned flow compares all of the bits named.")
            self._constant(LearnMatch, target, value)
        else:
            self._constant(LearnMatch, target, number(word.name, text, (1 << target.width) - 1))

    def _constant(self, kind: type[LearnMatch | LearnLoad], target: Bits, value: int) -> None:
        for part in map(Bits._make, self._parts(target)):
            piece = value & (1 << part.width) - 1
            self.specs.append(LearnMatch(part, piece) if kind is LearnMatch else LearnLoad(piece, part))
            value >>= part.width

    def _copy(self, kind: type[LearnMatch | LearnLoad], source: Bits, target: Bits, word: Word) -> None:
        if source.width != target.width:
            raise Refused(word.text, f"{target.width} bits on both sides", "Name as many bits of both fields.")
        for one, other in paired(self._parts(source), self._parts(target)):
            self.specs.append(LearnMatch(other, one) if kind is LearnMatch else LearnLoad(one, other))

    @staticmethod
    def _parts(of: Bits) -> list[tuple[int, int, int]]:
        if of.header == fields.IP_TOS.header:
            if of.start < 2:
                raise Refused(str(of), "ip_dscp", "Copy ip_dscp: the lowest two bits of nw_tos are never seen.")
            return [(fields.IP_DSCP.header, of.start - 2, of.width)]
        return fields.parts(*of)

    def done(self) -> Learn:
        """The action."""
        get = self.settings.get
        return Learn(
            self.settings["table"],
            self.settings["priority"],
            get("cookie", 0),
            get("idle_timeout", 0),
            get("hard_timeout", 0),
            get("limit", 0),
            tuple(self.specs),
            self.flags,
            get("fin_idle_timeout", 0),
            get("fin_hard_timeout", 0),
        )


_READERS: Final[dict[str, Callable[[ActionReader, Word], list[Action]]]] = {
    "output": ActionReader._output,
    "controller": ActionReader._controller,
    "enqueue": ActionReader._enqueue,
    "resubmit": ActionReader._resubmit,
    "goto_table": ActionReader._goto,
    "set_field": ActionReader._set_field,
    "load": ActionReader._load,
    "move": ActionReader._move,
    "write_metadata": ActionReader._write_metadata,
    "set_tunnel": ActionReader._set_tunnel,
    "set_tunnel64": ActionReader._set_tunnel,
    "mod_dl_src": ActionReader._mod_mac,
    "mod_dl_dst": ActionReader._mod_mac,
    "mod_nw_src": ActionReader._mod_ip,
    "mod_nw_dst": ActionReader._mod_ip,
    "mod_tp_src": ActionReader._mod_transport,
    "mod_tp_dst": ActionReader._mod_transport,
    "mod_nw_tos": ActionReader._mod_ip_word,
    "mod_nw_ecn": ActionReader._mod_ip_word,
    "mod_nw_ttl": ActionReader._mod_ip_word,
    "mod_vlan_vid": ActionReader._mod_vlan,
    "mod_vlan_pcp": ActionReader._mod_vlan,
    "set_vlan_vid": ActionReader._mod_vlan,
    "set_vlan_pcp": ActionReader._mod_vlan,
    "push_vlan": ActionReader._push_vlan,
    "pop_vlan": ActionReader._bare,
    "strip_vlan": ActionReader._bare,
    "dec_ttl": ActionReader._bare,
    "ct_clear": ActionReader._bare,
    "pop_queue": ActionReader._bare,
    "clear_actions": ActionReader._bare,
    "meter": ActionReader._numbered_aside,
    "set_queue": ActionReader._numbered_aside,
    "note": ActionReader._note,
    "learn": ActionReader._learn,
}
