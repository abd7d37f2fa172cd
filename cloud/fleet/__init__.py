"""Who belongs to the fleet and what is believed of it: operators and their certificates, and what devices report."""
