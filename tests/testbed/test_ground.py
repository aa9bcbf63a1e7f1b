"""The ground of the map: a picture that any reader of PNG takes, with its dots where the cities are."""

import struct
import zlib

import numpy as np
import pytest

from srmu.testbed.ground import ALPHAS, EAST, GREY, NORTH, SCALE, SOUTH, WEST, draw_ground


def read_png(data):
    """The colours (height, width, 4) of a picture with a palette."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, start = {}, 8
    while start < len(data):
        size, name = struct.unpack(">I4s", data[start : start + 8])
        body = data[start + 8 : start + 8 + size]
        (check,) = struct.unpack(">I", data[start + 8 + size : start + 12 + size])
        assert check == zlib.crc32(name + body)
        chunks[name] = body
        start += 12 + size
    assert [*chunks] == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()  # no line is filtered
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    alphas = np.frombuffer(chunks[b"tRNS"], np.uint8)
    return np.dstack([palette[lines[:, 1:]], alphas[lines[:, 1:]]])


def pixel_of(latitude, longitude):
    return int((NORTH - latitude) * SCALE), int((longitude - WEST) * SCALE)


@pytest.mark.parametrize("place", [(-1.29, 36.82), (64.15, -21.94), (-54.8, -68.3), (-16.5, 179.99), (40.7, -179.99)])
def test_a_city_is_a_grey_dot_where_it_lies(place):
    picture = read_png(draw_ground([place]))
    assert picture.shape == ((NORTH - SOUTH) * SCALE, (EAST - WEST) * SCALE, 4)
    assert (picture[..., :3] == GREY).all()
    row, column = pixel_of(*place)
    assert picture[row, column, 3] == ALPHAS[-1]
    assert picture[row - 1, column, 3] == ALPHAS[1]
    assert (picture[..., 3] > 0).sum() in (4, 5)  # a neighbour may be beyond the edge
    assert picture[0, 0, 3] == 0


def test_between_two_cities_it_is_darker_and_beyond_the_map_there_is_nothing():
    step = 2 / SCALE
    picture = read_png(draw_ground([(10, 20), (10, 20 + step), (10, 20), (NORTH + 1, 0), (SOUTH - 1, 0), (0, EAST)]))
    row, column = pixel_of(10, 20)
    assert [*picture[row, column - 1 : column + 4, 3]] == [ALPHAS[i] for i in (1, 3, 2, 3, 1)]
    assert (picture[..., 3] == ALPHAS[-1]).sum() == 2
    assert not read_png(draw_ground([]))[..., 3].any()


def test_all_cities_of_the_world_stay_small():
    draw = np.random.default_rng(0)
    places = draw.uniform((SOUTH, WEST), (NORTH, EAST), (34_000, 2))
    assert len(draw_ground(map(tuple, places))) < 120_000
