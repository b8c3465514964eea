"""The phases of a round, each written once, so that a run resumes behind the last finished one."""
