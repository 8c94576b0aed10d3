"""Several stages on one GPU: a stream per stage, and every tick of a method recorded as a CUDA graph with parallel branches. Experimental.

    period           what a method does at every tick of its period, and how many slots of memory that takes: known before the run
    static_messages  the memory: messages, inputs, labels at fixed addresses
    static_stage     one stage working on it
    streams          the recorder: CUDA graphs over streams, or on a CPU plain functions on the same memory
    ticks            the run: copy a batch in, replay, keep the books

On CPUs (tests/test_captured.py) and on one H200 (tests/gpu) this gives the numbers of the plain engine bit for bit.
"""
