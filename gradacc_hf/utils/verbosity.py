"""Silence transformers and datasets in commands that print results."""


def silence_libraries() -> None:
    """Turn off the warnings of transformers and the progress bars of transformers and datasets."""
    import transformers  # late: commands that print no results start without them
    from datasets import disable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
