"""lm-eval tasks: YAML files, and the functions that they name. docs/tasks.md says what each reproduces."""
