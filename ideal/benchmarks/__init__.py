"""Public benchmarks of finished models by lm-evaluation-harness, an extra (requirements-benchmarks.txt).

scores    which number of a task counts, and which results may be compared: pure functions
harness   the calls into lm_eval; nothing else imports it
stage     which models, which tasks are still missing, and the files they lead to
"""
