"""Simplex noise one pixel at a time: the sum over all points of the lattice, near or far."""

import math


def simplex_value(y: float, x: float, angles: list[list[float]], shift: tuple[float, float], frequency: float) -> float:
    """Value at pixel (y, x) for gradients of directions ``angles[row][column]``.

    The lattice is that of triangles of side sqrt(2/3), with points at row a + column b, where a and b are a little more
    than 60 degrees apart in skewed coordinates; ``shift`` is the place of pixel (0, 0) in them.
    """
    unskew = (3 - math.sqrt(3)) / 6

    def place(row: float, column: float) -> tuple[float, float]:
        return row - unskew * (row + column), column - unskew * (row + column)

    at_y, at_x = place(*shift)
    at_y, at_x = at_y + frequency * y, at_x + frequency * x
    total = 0.0
    for row, line in enumerate(angles):
        for column, angle in enumerate(line):
            point_y, point_x = place(row, column)
            dy, dx = at_y - point_y, at_x - point_x
            reach = 0.5 - dy * dy - dx * dx
            if reach > 0:
                total += reach**4 * (math.sin(angle) * dy + math.cos(angle) * dx)
    return total
