"""What a recovery will take, before anything is submitted: `camopd plan`. Arithmetic over a recipe and config.json files."""
