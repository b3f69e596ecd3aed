"""The trainer: stages of transforms and training, with resume and a report.

``python -m train.main --config configs/NAME.py --workdir DIR``
"""
