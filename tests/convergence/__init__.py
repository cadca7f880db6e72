"""Fixed small recipes, one of each family of models, whose curves are kept: what they learn must not become worse.

python -m tests.convergence                 all recipes, against the curves that are kept
python -m tests.convergence rwkv7 bitnet    some of them
python -m tests.convergence --update        train them and keep these curves
"""
