"""Each CUDA kernel launched alone, and held against its plain expression in float64.

A function here is one launch over random numbers of the sizes that it is given: the tests draw
them, and edges.check takes those where kernels break: less than a block or a tile, whole ones, and
a little more. What a kernel must not touch is filled before, and looked at after. Errors are
bounded by what sums of that many float32 numbers can lose.
"""
