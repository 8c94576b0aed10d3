"""Several stages on one GPU: a stream per stage, and every tick of a method recorded as a CUDA graph with parallel branches.

    cycle   what a method does at every tick of its period, and how many slots of memory that takes: known before the run
    slots   the memory: messages, inputs, labels at fixed addresses
    branch  one stage working on it
    lanes   the recorder: CUDA graphs over streams, or on a CPU plain functions on the same memory
    ticks   the run: copy a batch in, replay, keep the books

What has been run: everything here on CPUs, where it gives the numbers of the plain engine bit for bit (tests/test_captured.py). What
has not: `lanes.Streams`, the sixty lines that need a GPU, because the machines at hand had none; its tests skip there with that reason.
"""
