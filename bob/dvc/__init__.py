"""The one place that touches DVC's insides; tests/test_dvc.py says what is relied on.

`store` is its cache of objects, `pipeline` the stages of dvc.yaml, `forecast` what `dvc repro` will
do with them, `experiments` its queue. What they hand out is plain Python. Commands that DVC
documents (`dvc add`, `dvc repro`) are run as commands, wherever they are needed.
"""
