"""What a compiled train step needs, before there is a machine to run it on.

topologies   chips and slices, with their published figures
step         the train step of a config, lowered for a topology
program      the text of a compiled program
collectives  messages between devices in it
memory       bytes per device, and the largest batch that fits
estimate     expected time of a step and of a run
"""
