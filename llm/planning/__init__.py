"""Planning a run for hardware that is not there: its train step compiled ahead of time, and what that says.

topology     devices by name, made by the compiler of their platform
batch        the shapes of an experiment's batch, without data
program      the train step of an experiment, compiled
hlo          the compiled text: instructions, and how often each runs
collectives  what is sent, by kind and mesh axis
traffic      what is read from and written to memory
roofline     what all of it takes, at best
suggest      meshes ranked
page         the page that is printed
"""
