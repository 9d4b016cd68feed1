"""A study: several mask policies, each trained with several seeds, compared.

plan.py decides network, epochs and seeds from the time there is, costs.py
measures what they take, runner.py trains and evaluates one run after another,
summary.py compares what is finished, page.py writes it.
"""
