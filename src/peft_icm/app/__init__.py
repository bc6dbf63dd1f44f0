"""A page to try a generator on, here or as a Space of the Hub; needs the extra `app`."""
