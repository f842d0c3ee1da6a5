"""What `prepare` looks at: prompt files, checkpoints, tokenizers, chat templates, evaluation tasks."""
