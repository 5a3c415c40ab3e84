"""What a run costs, told before it is run: memory of a rank, bytes on the wire, seconds of a step.

micro_batch.py  what a forward and backward pass keeps, generates and computes, from the real model without memory
gathering.py    which frozen weights become whole in it, where the ranks split them
memory.py       bytes that a rank holds, by what they are for
step_time.py    seconds of a step on machines of given speeds
tables.py       all of it as text

What a DeepSpeed configuration decides and the bytes on the wire are train/zero.py and train/traffic.py, since a run
says them as well.
"""
