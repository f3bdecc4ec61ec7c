"""Instructions that read and write memory: loads, stores, atomic updates, asynchronous copies."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptx.arithmetic import parts_of
from tests.ptx.code import Code, Mask, Step, form
from tests.ptx.memory import BITS, differ, spread
from tests.ptx.parse import Address, Fault, Instruction, Operand
from tests.ptx.rounding import TYPES, UNSIGNED

Array = np.ndarray[Any, Any]
_TYPE = r"(\.v[24])?\.[bsuf](8|16|32|64)"


def _widths(instruction: Instruction) -> tuple[str, int, int]:
    """(type, numbers, bytes of each)."""
    kind = parts_of(instruction)[-1]
    many = re.search(r"\.v([24])\.", instruction.op)
    return kind, int(many[1]) if many else 1, np.dtype(TYPES[kind]).itemsize


def _as_list(operand: Operand) -> list[str]:
    if isinstance(operand, Address):
        raise Fault(f"an address {operand} in place of registers")
    return operand if isinstance(operand, list) else [operand]


def _users(code: Code, shape: tuple[int, ...], chosen: Array | None) -> Array:
    """(k, 1): who makes each access of a shape; one for all threads is of many warps."""
    user = code.user() if shape[1] > 1 else code.user_of_many()
    if shape[0] == 1:
        # One access for all programs: by the first, and then by the last.
        user = user[:1] if code.shape[0] == 1 else user[-1:]
    return (user.reshape(-1) if chosen is None else user[chosen])[:, None]


class Place:
    """Checked places in one kind of memory, for one instruction."""

    def __init__(self, code: Code, instruction: Instruction, size: int, alignment: int) -> None:
        self.code, self.where = code, instruction.where
        self.size, self.alignment = size, alignment
        self.is_shared = "shared" in instruction.op
        # The tensor of the last time, and which ones those of this time are.
        self._hint = 0
        self._which: int | Array = 0

    def find(self, address: Array, mask: Mask) -> tuple[tuple[int, ...], Array | None, Array]:
        """(shape, chosen, flat addresses), within bounds; those of shared memory in all of it."""
        if not self.is_shared:
            shape, chosen, (flat,) = spread(mask, address)
            return shape, chosen, flat
        if mask is None:
            self.code.shared.check(address, self.size, self.alignment, self.where)
            shape, chosen, (flat,) = spread(None, address + self.code.shared_base)
            return shape, chosen, flat
        shape, chosen, (flat, base) = spread(mask, address, self.code.shared_base)
        if flat.size:
            self.code.shared.check(flat, self.size, self.alignment, self.where)
        return shape, chosen, flat + base

    def load(self, place: Array, shape: tuple[int, ...], chosen: Array | None) -> Array:
        code = self.code
        if self.is_shared:
            if code.options.races:
                self.read_shared(place, _users(code, shape, chosen))
            return code.shared.words[self.size].take(place // self.size)
        self._check(place)
        data = code.memory.load(place, self.size)
        for which, part in self._each():
            if self.size >= 4 and code.memory.is_unwritten(which, data[part]):
                code.report(f"{self.where} reads what nothing has written of {self._name(which)}")
            if code.options.races:
                self._note_read(which, place[part], _users(code, shape, chosen)[part], shape)
        return data

    def store(
        self, place: Array, value: Array, shape: tuple[int, ...], chosen: Array | None
    ) -> None:
        code = self.code
        if self.is_shared:
            self.store_shared(place, value, _users(code, shape, chosen))
            return
        self._check(place)
        if not code.options.races:
            code.memory.store(place, value, self.size)
            return
        earlier = differ(code.memory.load(place, self.size), value)
        code.memory.store(place, value, self.size)
        now = differ(code.memory.load(place, self.size), value)
        for which, part in self._each():
            at = place[part] - int(code.memory.bases[which])
            user = _users(code, shape, chosen)[part]
            raced = code.memory.marks[which].write(at, self.size, user)
            self._report(raced, earlier[part], now[part], which)

    def store_shared(self, place: Array, value: Array, user: Array) -> None:
        shared = self.code.shared
        words, at = shared.words[self.size], place // self.size
        if not self.code.options.races:
            words[at] = value
            return
        n = self.code.n_checked(place)
        earlier = differ(words[at[:n]], value[:n])
        words[at] = value
        now = differ(words[at[:n]], value[:n])
        place, user = place[:n], user[:n]
        if np.count_nonzero(shared.is_pending[place // 16]):
            self.code.report(f"{self.where} writes where an asynchronous copy is still to write")
        self._report(shared.marks.write(place, self.size, user), earlier, now, None)

    def _report(
        self, raced: tuple[Array, Array], earlier: Array, now: Array, which: int | None
    ) -> None:
        """Writing what is there already is no race, nor is the same value from all."""
        if np.count_nonzero(raced[0] & earlier):
            other = f"another {_WHO[which is None]} has read or written"
            self.code.report(f"race: {self.where} writes {self._name(which)} where {other}")
        if np.count_nonzero(raced[1] & now):
            other = f"{_WHO[which is None]}s write several values at once"
            self.code.report(f"race: {self.where}, where {other} ({self._name(which)})")

    def _name(self, which: int | None) -> str:
        return "shared memory" if which is None else self.code.memory.names[which]

    def read_shared(self, place: Array, user: Array) -> None:
        """Check accesses (k,) of users (k, 1)."""
        code = self.code
        n = code.n_checked(place)
        place, user = place[:n], user[:n]
        if code.shared.marks.read(place, self.size, user):
            code.report(f"race: {self.where} reads shared memory where another warp wrote")
        if np.count_nonzero(code.shared.is_pending[place // 16]):
            code.report(f"{self.where} reads what an asynchronous copy is still to write")
        elif not code.shared.marks.is_written(place, self.size):
            code.report(f"{self.where} reads shared memory that nothing has written")

    def _note_read(self, which: int, place: Array, user: Array, shape: tuple[int, ...]) -> None:
        code = self.code
        at = place - int(code.memory.bases[which])
        marks = code.memory.marks[which]
        raced = marks.read(at, self.size, user)
        if shape[0] == 1 and code.shape[0] > 1:
            first = code.user_of_many()[:1]
            raced |= marks.read(at, self.size, np.broadcast_to(first, user.shape))
        if raced:
            code.report(
                f"race: {self.where} reads {self._name(which)} where another {_WHO[False]} wrote"
            )

    def _check(self, place: Array) -> None:
        self._which = self.code.memory.find(place, self.size, self._hint, self.where)
        if isinstance(self._which, int):
            self._hint = self._which

    def _each(self) -> list[tuple[int, Any]]:
        if isinstance(self._which, int):
            return [(self._which, slice(None))]
        return [(int(which), self._which == which) for which in np.unique(self._which)]

    def update(self, place: Array, shape: tuple[int, ...], chosen: Array | None) -> None:
        self._check(place)
        if not self.code.options.races:
            return
        for which, part in self._each():
            at = place[part] - int(self.code.memory.bases[which])
            user = _users(self.code, shape, chosen)[part]
            if self.code.memory.marks[which].update(at, self.size, user):
                self.code.report(
                    f"race: {self.where} updates {self._name(which)} where another {_WHO[False]} "
                    "reads or writes without"
                )

    # Of asynchronous copies, by threads (k,) of all that run.

    def note_copy(self, place: Array, thread: Array) -> None:
        shared = self.code.shared
        shared.is_pending[place // 16] = True
        if shared.marks.is_read_by_others(place, self.size, self._users_of(thread)):
            self.code.report(f"race: {self.where} copies to where another warp reads")

    def finish_copy(self, place: Array, data: Array, thread: Array) -> None:
        shared = self.code.shared
        if self.code.options.races:
            shared.is_pending[place // 16] = False
        self.store_shared(place, data, self._users_of(thread))

    def _users_of(self, thread: Array) -> Array:
        return self.code.user().ravel()[thread][:, None]


_WHO = {True: "warp", False: "warp or program"}


# --- loads and stores ----------------------------------------------------------------------------


@form(r"ld\.param\.[bsuf](32|64)")
def _load_parameter(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    destination, source = instruction.operands
    types = dict(code.kernel.parameters)
    if not isinstance(source, Address) or source.offset or source.base not in types:
        raise Fault(f"{instruction.where}: {instruction.text}")
    name, own = source.base, TYPES[types[source.base]]
    put = code.put(destination, kind, instruction)
    size = np.dtype(own).itemsize

    def load(mask: Mask) -> None:
        value = code.arguments[name]
        if isinstance(value, float):
            bits = np.full((1, 1), value, f"f{size}").view(UNSIGNED[size])
        else:
            bits = np.full((1, 1), int(value) & (1 << 8 * size) - 1, UNSIGNED[size])
        put(bits.view(TYPES[kind]), mask)

    return load


@form(rf"ld\.(global|shared){_TYPE}")
def _load(code: Code, instruction: Instruction) -> Step:
    kind, n, size = _widths(instruction)
    destination, source = instruction.operands
    names = _as_list(destination)
    if len(names) != n:
        raise Fault(f"{instruction.where}: {instruction.text}")
    unsigned, dtype = UNSIGNED[size], TYPES[kind]
    nothing = np.zeros((1, 1), dtype)
    puts = [code.put(name, kind, instruction) for name in names]
    address, narrow = code.address(source), code.chosen(instruction)
    place = Place(code, instruction, n * size, n * size)

    def load(mask: Mask) -> None:
        shape, chosen, at = place.find(address(), narrow(mask))
        if not at.size:
            for put in puts:
                put(nothing, mask)
            return
        data = place.load(at, shape, chosen).view(unsigned)
        if chosen is None:
            parts = data.reshape(*shape, n)
        else:
            parts = np.zeros((*shape, n), unsigned)
            parts[chosen] = data.reshape(-1, n)
        for number, put in enumerate(puts):
            put(np.ascontiguousarray(parts[..., number]).view(dtype), mask)

    return load


@form(rf"st\.(global|shared){_TYPE}")
def _store(code: Code, instruction: Instruction) -> Step:
    kind, n, size = _widths(instruction)
    target, source = instruction.operands
    kind = f"b{8 * size}"
    slots = [code.use(name, kind) for name in _as_list(source)]
    if len(slots) != n:
        raise Fault(f"{instruction.where}: {instruction.text}")
    R = code.R
    address, narrow = code.address(target), code.chosen(instruction)
    place = Place(code, instruction, n * size, n * size)
    whole = BITS[n * size]

    def store(mask: Mask) -> None:
        values = [R[slot] for slot in slots]
        shape = np.broadcast_shapes(*(value.shape for value in values))
        block = np.empty((*shape, n), UNSIGNED[size])
        for number, value in enumerate(values):
            block[..., number] = value
        where = address()
        if where.shape != shape:
            where = np.broadcast_to(where, np.broadcast_shapes(where.shape, shape))
        full, chosen, at = place.find(where, narrow(mask))
        if not at.size:
            return
        words = block.view(whole)[..., 0]
        if words.shape != full:
            words = np.broadcast_to(words, full)
        place.store(at, words.reshape(-1) if chosen is None else words[chosen], full, chosen)
        if place.is_shared:
            code.is_unfenced = True

    return store


# --- atomic updates ------------------------------------------------------------------------------

_UPDATES: dict[str, Any] = {"add": np.add, "max": np.maximum, "min": np.minimum}


@form(r"red\.global\.gpu\.relaxed\.((add|max|min)\.[su](32|64))")
def _update(code: Code, instruction: Instruction) -> Step:
    *_, name, kind = parts_of(instruction)
    target, source = instruction.operands
    R, slot = code.R, code.use(source, kind)
    address, narrow = code.address(target), code.chosen(instruction)
    dtype = TYPES[kind]
    size = np.dtype(dtype).itemsize
    place = Place(code, instruction, size, size)
    function = _UPDATES[name]

    def update(mask: Mask) -> None:
        # Every thread of every program updates, also where all have the same address.
        wide = np.broadcast_to(address(), code.shape)
        shape, chosen, at = place.find(wide, narrow(mask))
        if not at.size:
            return
        value = np.broadcast_to(R[slot], shape)
        place.update(at, shape, chosen)
        cells, which = np.unique(at, return_inverse=True)
        numbers = code.memory.load(cells, size).view(dtype)
        function.at(numbers, which, value.ravel() if chosen is None else value[chosen])
        code.memory.store(cells, numbers.view(UNSIGNED[size]), size)

    return update


# --- asynchronous copies -------------------------------------------------------------------------
# What they bring is written when the program waits for it, and not before.


@form(r"cp\.async\.c[ag]\.shared\.global")
def _copy(code: Code, instruction: Instruction) -> Step:
    target, source, n_bytes, *more = instruction.operands
    size = int(str(n_bytes), 0)
    R = code.R
    to, of, narrow = code.address(target), code.address(source), code.chosen(instruction)
    length = code.use(more[0], "u32") if more else None
    inside = Place(code, instruction, size, size)
    outside = Place(code, instruction, size, size)
    outside.is_shared = False

    def copy(mask: Mask) -> None:
        mask = narrow(mask)
        shape, chosen, place = inside.find(np.broadcast_to(to(), code.shape), mask)
        if not place.size:
            return
        # Of fewer bytes than asked the rest are zeros; here all or none.
        n = np.broadcast_to(np.uint32(size) if length is None else R[length], shape)
        data = np.zeros(shape, BITS[size])
        is_read = n == size if mask is None else (n == size) & mask
        if np.count_nonzero(is_read):
            full, taken, at = outside.find(np.broadcast_to(of(), shape), is_read)
            loaded = outside.load(at, full, taken)
            data[...] = loaded.reshape(shape) if taken is None else 0
            if taken is not None:
                data[taken] = loaded
        thread = np.arange(data.size) if chosen is None else np.flatnonzero(chosen)
        if code.options.races:
            inside.note_copy(place, thread)
        group = code.copies.opened[thread // code.n_threads]
        code.copies.held.append((inside, place, data.ravel()[thread], thread, group))

    return copy


@form(r"cp\.async\.commit_group")
def _commit_copies(code: Code, instruction: Instruction) -> Step:
    return lambda mask: code.copies.commit(mask)


@form(r"cp\.async\.wait_group|cp\.async\.wait_all")
def _wait_for_copies(code: Code, instruction: Instruction) -> Step:
    n = int(str(instruction.operands[0]), 0) if instruction.operands else 0

    def wait(mask: Mask) -> None:
        done = code.copies.done(mask, n)
        held, code.copies.held = code.copies.held, []
        for inside, place, data, thread, group in held:
            now = group < done[thread // code.n_threads]
            if np.count_nonzero(now):
                inside.finish_copy(place[now], data[now], thread[now])
            if not now.all():
                rest = (each[~now] for each in (place, data, thread, group))
                code.copies.held.append((inside, *rest))

    return wait
