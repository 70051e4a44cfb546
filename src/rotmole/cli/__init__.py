"""What each verb of the command line does: one short file per verb, declared in rotmole_cli."""
