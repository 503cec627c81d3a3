"""The bit formats again, one bit at a time on Python ints, as docs/format.md words them.

Nothing here comes from exllama_ops: the tests compare the two. A column of values becomes a list of words, each in
[0, 2**32).
"""

BLOCK_VALUES = {2: 16, 3: 32, 4: 8, 8: 4}
BLOCK_WORDS = {2: 1, 3: 3, 4: 1, 8: 1}

SHUFFLED_SHIFT = {
    2: [0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30],
    4: [0, 16, 4, 20, 8, 24, 12, 28],
    8: [0, 8, 16, 24],
}


def checkpoint_place(bits, j, b):
    """(word, bit) of bit b of value j of a block, in checkpoint order."""
    if bits != 3:
        return 0, bits * j + b
    if j < 10:
        return 0, 3 * j + b
    if j == 10:
        return [(0, 30), (0, 31), (1, 0)][b]
    if j < 21:
        return 1, 3 * (j - 11) + 1 + b
    if j == 21:
        return [(1, 31), (2, 0), (2, 1)][b]
    return 2, 3 * (j - 22) + 2 + b


def shuffled_place(bits, j, b):
    """(word, bit) of bit b of value j of a block, in shuffled order."""
    if bits != 3:
        return 0, SHUFFLED_SHIFT[bits][j] + b
    if j == 30:
        return b, 15
    if j == 31:
        return b, 31
    pair, odd = divmod(j % 10, 2)
    return j // 10, 3 * pair + (16 if odd else 0) + b


PLACE = {"checkpoint": checkpoint_place, "shuffled": shuffled_place}


def pack(values, bits, order="checkpoint"):
    """The words of a list of values."""
    words = [0] * (len(values) * bits // 32)
    for k, value in enumerate(values):
        block, j = divmod(k, BLOCK_VALUES[bits])
        for b in range(bits):
            word, position = PLACE[order](bits, j, b)
            if value >> b & 1:
                words[block * BLOCK_WORDS[bits] + word] += 1 << position
    return words


def unpack(words, bits, order="checkpoint"):
    """The values of a list of words."""
    values = [0] * (len(words) * 32 // bits)
    for k in range(len(values)):
        block, j = divmod(k, BLOCK_VALUES[bits])
        for b in range(bits):
            word, position = PLACE[order](bits, j, b)
            values[k] += (words[block * BLOCK_WORDS[bits] + word] >> position & 1) << b
    return values


def shuffle(words, perm, bits):
    """The shuffled words of one column; ``perm`` is a list, or None for no permutation."""
    values = unpack(words, bits)
    return pack(values if perm is None else [values[k] for k in perm], bits, "shuffled")


def unshuffle(words, perm, bits):
    """The checkpoint words of one shuffled column."""
    sorted_values = unpack(words, bits, "shuffled")
    values = list(sorted_values)
    for i, k in enumerate(range(len(values)) if perm is None else perm):
        values[k] = sorted_values[i]
    return pack(values, bits)


def columns(tensor):
    """The columns of a 2-D int32 tensor as lists of words in [0, 2**32)."""
    return [[word & 0xFFFFFFFF for word in column] for column in tensor.t().tolist()]
