"""Reads a compiled program's text: what runs, how often, what it computes, moves and sends.

A small reader of XLA's HLO text, for compile_check: computations, instructions with shapes and memory spaces, the trip
counts of loops, FLOPs of products and bytes of collectives. It knows what the TPU compiler writes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
         'u64': 8, 'f64': 8, 'token': 0}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'iota',
        'opt-barrier', 'while', 'conditional', 'call', 'copy-done', 'slice-done', 'async-done', 'async-update', 'recv'}
NAMES_ONLY = {'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound'}  # custom calls that move nothing
SHAPE = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its type, dimensions, and whether it lies in fast memory on the chip (S(1), VMEM)."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name = shape opcode(operands), attributes."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; '' without a match."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ''

    @property
    def free(self) -> bool:
        """Whether it does nothing itself."""
        return self.opcode in FREE or self.attribute(r'custom_call_target="(\w+)"') in NAMES_ONLY

    @property
    def path(self) -> str:
        """Where in the model it comes from."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def between_slices(self) -> str:
        """The name of what it sends or receives over the data-centre's network; '' for none."""
        return self.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"')


class Program:
    """A compiled program.

    Attributes:
      computations: name -> its instructions by name, in order.
      entry: the name of the first.
      aliased: how many of its outputs take the place of inputs.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = '', None
        header = text.split('\n', 1)[0]
        self.aliased = len(re.findall(r'-alias\)', header))
        for line in text.split('\n'):
            if line.startswith(('%', 'ENTRY')) and line.endswith('{'):
                name = line.removeprefix('ENTRY ').split(' ')[0].lstrip('%')
                self.entry = name if line.startswith('ENTRY') else self.entry
                current = self.computations.setdefault(name, {})
            elif line.startswith('  ') and ' = ' in line and current is not None:
                instruction = _instruction(line)
                current[instruction.name] = instruction
        for body in self.computations.values():
            body |= {name: self._reduce_scatter(i) for name, i in body.items()
                     if 'calls=%all-reduce-scatter' in i.attributes}
            body |= _between_slices(body)

    def _reduce_scatter(self, fusion: Instruction) -> Instruction:
        """What the TPU compiler writes as a fusion of an all-reduce and slices of its results."""
        (reduced,) = (i for i in self._inside(fusion) if i.opcode == 'all-reduce')
        return dataclasses.replace(fusion, opcode='reduce-scatter', attributes=reduced.attributes + fusion.attributes)

    def _inside(self, fusion: Instruction) -> list[Instruction]:
        return list(self.computations.get(fusion.attribute(r'calls=%?([\w.\-]+)'), {}).values())

    def walk(self, computation: str = '', times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of all that is executed; fusions are not entered."""
        name = computation or self.entry
        for instruction in self.computations[name].values():
            yield name, instruction, times
            for called, more in self.called(instruction):
                yield from self.walk(called, times * more)

    def called(self, instruction: Instruction) -> list[tuple[str, int]]:
        """(computation, how often) of a loop, a branch or a call; a fusion is one instruction."""
        if instruction.opcode == 'while':
            return [(instruction.attribute(r'body=%?([\w.\-]+)'), self.trip_count(instruction))]
        if instruction.opcode not in ('call', 'conditional', 'async-start'):
            return []
        return [(name, 1) for name in re.findall(
            r'(?:to_apply|calls|true_computation|branch_computations)=\{?%?([\w.\-]+)', instruction.attributes)]

    def trip_count(self, loop: Instruction) -> int:
        """How often a counted loop runs: from what its counter begins with to the constant that ends it.

        A loop whose first round the compiler has taken out begins with 1.
        """
        condition = self.computations[loop.attribute(r'condition=%?([\w.\-]+)')]
        limits = [int(i.operands[0]) for i in condition.values() if i.opcode == 'constant' and i.operands[0].isdigit()]
        counters = [int(i.attribute(r'index=(\d+)')) for i in condition.values() if i.opcode == 'get-tuple-element']
        return max(limits) - self._first(loop, min(counters)) if limits and counters else 1

    def _first(self, loop: Instruction, counter: int) -> int:
        """What a loop's counter begins with; 0 where that is no constant."""
        body = next(body for body in self.computations.values() if body.get(loop.name) is loop)
        start = body[loop.operands[0]]
        if start.opcode == 'tuple':
            start = body[start.operands[counter]]
        while start.opcode in ('copy', 'bitcast'):
            start = body[start.operands[0]]
        return int(start.operands[0]) if start.opcode == 'constant' and start.operands[0].isdigit() else 0

    def carried(self, instruction: Instruction) -> tuple[list[Instruction], bool]:
        """The collectives that a fusion carries on during its work, and whether it waits for their end.

        Each runs through several fusions, in all of which it has the same channel.
        """
        body = self._inside(instruction) if instruction.opcode == 'fusion' else []
        return [i for i in body if i.opcode in COLLECTIVES], any('AsyncCollectiveDone' in i.attributes for i in body)

    @functools.cache  # noqa: B019 - a program is read once
    def flops(self, computation: str, name: str) -> int:
        """Of the products in an instruction; of a fusion, all in it."""
        instruction = self.computations[computation][name]
        if instruction.opcode in ('dot', 'convolution'):
            return 2 * self._multiplications(computation, instruction)
        inside = instruction.attribute(r'calls=%?([\w.\-]+)') if instruction.opcode == 'fusion' else ''
        return sum(self.flops(inside, inner) for inner in self.computations.get(inside, ()))

    def inputs(self, computation: str, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction reads."""
        known = self.computations[computation]
        return [array for operand in instruction.operands if operand in known for array in known[operand].arrays]

    def memory_bytes(self, computation: str, instruction: Instruction) -> int:
        """What an instruction moves to and from main memory; of an array that is sliced, the slice."""
        if instruction.free:
            return 0
        inside = instruction.attribute(r'calls=%?([\w.\-]+)') if instruction.opcode == 'fusion' else ''
        reads = self.inputs(computation, instruction)
        if inside in self.computations and len(instruction.operands) == len(reads):
            sizes = [self._read(inside, number, array) for number, array in enumerate(reads)]
            return sum(sizes) + self._written(inside, instruction)
        return sum(array.bytes for array in (*reads, *instruction.arrays) if not array.on_chip)

    def _read(self, inside: str, number: int, array: Array) -> int:
        """Bytes that a fusion reads of its operand `number`."""
        if array.on_chip:
            return 0
        body = self.computations[inside]
        name = next((i.name for i in body.values() if i.opcode == 'parameter' and i.operands == (str(number),)), '')
        return min(array.bytes, self._used(inside, name, array))

    def _used(self, inside: str, name: str, array: Array) -> int:
        size = 0
        for user in (i for i in self.computations[inside].values() if name in i.operands):
            first = user.operands[0] == name
            if user.opcode in ('dynamic-slice', 'gather', 'slice') and first:
                size += user.arrays[0].bytes
            elif user.opcode == 'dynamic-update-slice' and first:
                continue
            elif user.opcode == 'bitcast':
                size += self._used(inside, user.name, array)
            elif user.opcode == 'fusion':
                called = user.attribute(r'calls=%?([\w.\-]+)')
                if {i.opcode for i in self.computations[called].values()} <= {'parameter', 'copy', 'bitcast'}:
                    size += self._used(inside, user.name, array)  # another layout, of what is used alone
                    continue
                size += sum(self._read(called, at, array) for at, one in enumerate(user.operands) if one == name)
            else:
                return array.bytes
        return size

    def _written(self, inside: str, instruction: Instruction) -> int:
        body = self.computations[inside]
        updates = [i for i in body.values() if i.opcode == 'dynamic-update-slice']
        size = sum(array.bytes for array in instruction.arrays if not array.on_chip)
        for update in updates:
            if any(array.dims == update.arrays[0].dims and not array.on_chip for array in instruction.arrays):
                size += body[update.operands[1]].arrays[0].bytes - update.arrays[0].bytes
        return max(size, 0)

    def _multiplications(self, computation: str, instruction: Instruction) -> int:
        """Of a dot; of a convolution, as which the TPU compiler writes dots, those that do not meet padding or gaps."""
        left, right = self.inputs(computation, instruction)[:2]
        (out,) = instruction.arrays
        if instruction.opcode == 'dot':
            axes = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}')
            return math.prod(out.dims) * math.prod(left.dims[int(axis)] for axis in axes.split(',') if axis)
        lhs, rhs, result = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes).groups()
        count = out.dims[result.index('b')] * out.dims[result.index('f')] * right.dims[rhs.index('i')]
        window = {key: instruction.attribute(rf'window=\{{[^}}]*\b{key}=([^ }}]+)').split('x')
                  for key in ('size', 'stride', 'pad', 'lhs_dilate', 'rhs_dilate')}
        for axis in range(len(window['size']) if window['size'] != [''] else 0):
            one = {key: values[axis] if values != [''] else '' for key, values in window.items()}
            place = str(axis)
            count *= _meetings(left.dims[lhs.index(place)], out.dims[result.index(place)], int(one['size']),
                               int(one['stride'] or 1), int((one['pad'] or '0_0').split('_')[0]),
                               int(one['lhs_dilate'] or 1), int(one['rhs_dilate'] or 1))
        return count


def _between_slices(body: dict[str, Instruction]) -> dict[str, Instruction]:
    """A collective between slices, a send to the host and a recv from it, as one that is started and awaited."""
    found: dict[str, Instruction] = {}
    sent = {i.between_slices: name for name, i in body.items() if i.opcode == 'send'}
    for name, i in body.items():
        if i.opcode == 'send' and i.between_slices:
            kind = i.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace('_', '-')
            found[name] = dataclasses.replace(i, opcode=f'{kind}-start', arrays=i.arrays[:1])
        elif i.opcode == 'recv-done' and body[i.operands[0]].between_slices:
            found[name] = dataclasses.replace(i, operands=(sent[body[i.operands[0]].between_slices],))
    return found


def _meetings(inputs: int, outputs: int, size: int, stride: int, pad: int, input_gap: int, window_gap: int) -> int:
    """How many (output, window) places of one axis of a convolution read a real input."""
    places = (out * stride - pad + at * window_gap for out in range(outputs) for at in range(size))
    return sum(place % input_gap == 0 and 0 <= place // input_gap < inputs for place in places)


def _instruction(line: str) -> Instruction:
    head, _, rest = line.strip().removeprefix('ROOT ').partition(' = ')
    end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
    shape, rest = rest[:end + 1], rest[end + 1:].strip()
    opcode, _, _ = rest.partition('(')
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1:close]
    operands = tuple(re.findall(r'%([\w.\-]+)', inside)) or (inside.strip(),)
    arrays = tuple(Array(dtype, tuple(int(n) for n in dims.split(',') if n), 'S(1)' in (layout or ''))
                   for dtype, dims, layout in SHAPE.findall(shape))
    return Instruction(head.lstrip('%'), arrays, opcode, operands, rest[close + 1:])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)
