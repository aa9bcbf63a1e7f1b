"""The ground of a map: every city of the world as a grey dot, from which the continents appear."""

import struct
import zlib
from collections.abc import Iterable

import numpy as np

WEST, EAST, SOUTH, NORTH = -180, 180, -57, 75  # degrees: a degree east is as wide as a degree north is high
SCALE = 4  # pixels a degree
GREY = (128, 136, 144)  # seen on white and on near-black alike
ALPHAS = (0, 64, 104, 160)  # nothing, beside a city, beside several, a city


def draw_ground(places: Iterable[tuple[float, float]]) -> bytes:
    """A PNG picture of places (latitude, longitude); those outside of the map are left out."""
    width, height = (EAST - WEST) * SCALE, (NORTH - SOUTH) * SCALE
    latitudes, longitudes = np.array([*places], dtype=float).reshape(-1, 2).T
    rows, columns = np.floor((NORTH - latitudes) * SCALE), np.floor((longitudes - WEST) * SCALE)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    cities = np.zeros((height + 2, width + 2), dtype=np.uint8)  # with an edge, so that each has four beside it
    cities[rows[inside].astype(int) + 1, columns[inside].astype(int) + 1] = 1
    beside = cities[:-2, 1:-1] + cities[2:, 1:-1] + cities[1:-1, :-2] + cities[1:-1, 2:]
    levels = np.where(cities[1:-1, 1:-1], 3, beside.clip(max=2)).astype(np.uint8)
    lines = np.pad(levels, ((0, 0), (1, 0)))  # each line begins with its filter: none
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),  # 8 bits, colours from a palette
        b"PLTE": bytes(GREY) * len(ALPHAS),
        b"tRNS": bytes(ALPHAS),
        b"IDAT": zlib.compress(lines.tobytes(), 9),
        b"IEND": b"",
    }
    packed = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
              for name, data in chunks.items())  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
