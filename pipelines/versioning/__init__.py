"""The only door to DVC: plan, reproduce, remote, artifact store, locks and patches."""
