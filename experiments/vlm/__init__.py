"""The vision-language experiment. spec.py holds its TrainSpec, config.py its options."""
