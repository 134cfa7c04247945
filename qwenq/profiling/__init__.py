"""Measure speed, memory and energy of running a model, each point in a process of its own.

spec        what is measured: a sweep is a list of points
planning    seconds and bytes of a point, before it is measured; how a budget is shared
sweep       run the points, write their rows; points that are measured are skipped
child       start the processes of a point and read their rows
worker      the process of a point
measure     protocol, prefill, decode, bandwidth
meters      memory, energy, bandwidth of a copy
table       the rows of a sweep as a table
"""
