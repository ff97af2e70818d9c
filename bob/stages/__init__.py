"""The stages of `dvc.yaml`, one module each, named as there."""
