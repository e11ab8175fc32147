"""Writes tests/goldens/gguf_blocks.json: packed blocks of random bytes, and the numbers that they stand for.

    python -P tests/goldens/gguf_blocks.py

The numbers are worked out one by one in plain Python from the published layout of the blocks (block_q4_0 ... block_q6_K
of ggml-common.h: fields in order, little-endian); nothing that the project reads GGUF with has a part in it.
"""

import json
import pathlib
import random
import struct

HERE = pathlib.Path(__file__).parent


def half(data: bytes) -> float:
    """A number of two bytes."""
    return struct.unpack("<e", data)[0]


def signed(byte: int) -> int:
    """A byte in two's complement."""
    return byte - 256 if byte > 127 else byte


def q8_0(block: bytes) -> list[float]:
    """A scale, then 32 numbers of a byte."""
    return [half(block[:2]) * signed(byte) for byte in block[2:]]


def q4_0(block: bytes) -> list[float]:
    """A scale, then 16 bytes: the low halves are the first 16 numbers, the high halves the others; 8 is zero."""
    halves = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [half(block[:2]) * (n - 8) for n in halves]


def q4_1(block: bytes) -> list[float]:
    """A scale and a least number, then halves as in Q4_0."""
    halves = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [half(block[:2]) * n + half(block[2:4]) for n in halves]


def q4_k(block: bytes) -> list[float]:
    """Two scales, 12 bytes with the scale and the least number of each of 8 parts in 6 bits, 4 bits a number.

    The numbers of two parts lie in the low and the high halves of the same 32 bytes.
    """
    packed, found = block[4:16], []
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = (packed[part + 4] & 15) + 16 * (packed[part - 4] >> 6)
            least = (packed[part + 4] >> 4) + 16 * (packed[part] >> 6)
        for n in range(32):
            byte = block[16 + 32 * (part // 2) + n]
            number = byte >> 4 if part % 2 else byte & 15
            found.append(half(block[:2]) * scale * number - half(block[2:4]) * least)
    return found


def q6_k(block: bytes) -> list[float]:
    """128 bytes with the low 4 bits of numbers, 64 with their high 2, 16 signed scales, a scale of them; 32 is zero.

    In each half of the block, number 32 r + n has its low bits in byte 32 (r mod 2) + n, in the high half of it for r
    of 2 and 3, and its high bits at place 2 r of byte n.
    """
    found = []
    for number in range(256):
        side, rest = divmod(number, 128)
        r, n = divmod(rest, 32)
        low = block[64 * side + 32 * (r % 2) + n]
        low = low >> 4 if r > 1 else low & 15
        high = (block[128 + 32 * side + n] >> (2 * r)) & 3
        scale = signed(block[192 + number // 16])
        found.append(half(block[208:]) * scale * (low + 16 * high - 32))
    return found


# Bytes of a block, where its halves lie that are scales, and its numbers.
KINDS = {"Q8_0": (34, [0], q8_0), "Q4_0": (18, [0], q4_0), "Q4_1": (20, [0, 2], q4_1), "Q4_K": (144, [0, 2], q4_k),
         "Q6_K": (210, [208], q6_k)}  # fmt: skip


def main() -> None:
    """Writes two blocks of each kind."""
    rng, made = random.Random(0), {}
    for name, (size, scales, numbers) in KINDS.items():
        blocks = []
        for _ in range(2):
            block = bytearray(rng.randbytes(size))
            for place in scales:  # a finite number of a useful size
                block[place : place + 2] = struct.pack("<e", rng.uniform(-0.1, 0.1))
            blocks.append(bytes(block))
        rows = [[float(f"{x:.9g}") for x in numbers(block)] for block in blocks]
        made[name] = {"bytes": [block.hex() for block in blocks], "numbers": rows}
    (HERE / "gguf_blocks.json").write_text(json.dumps(made, indent=0).replace(",\n", ", ") + "\n")


if __name__ == "__main__":
    main()
