"""Check of a machine's accelerator, which launch/gpu_check.sh starts.

command runs the parts, each in a process of its own, and writes their tables;
parts are what is checked and timed; parity compares with float32.
"""
