"""Speed, memory and energy of running a model, each point in a process of its own.

points      what is measured: a sweep is a list of points
statistics  medians, their intervals, outliers
planning    how long a sweep will take, what fits, who gets how much of a budget
sweep       one child process a point; rows as they come; what is done is not done again
point       the child: measures one point
measure     how: protocol, decode, prefill, memory, energy, bandwidth
rounded     a model rounded to 4 or 8 bits on the fly, for speed and memory only
table       rows as a table that names once what does not vary
"""
