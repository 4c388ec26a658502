"""What is wrong with a run that its user can put right."""


class UserError(Exception):
    """One sentence that names the config key or the file, what is wrong and what would be right.

    The command prints it without a traceback and exits with 1. Anything else that is raised is a
    fault of the program and keeps its traceback.
    """
