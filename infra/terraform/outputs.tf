output "policy_arns" {
  description = "To be attached to who publishes, reads, promotes, and to MLflow's server."
  value       = { for role, policy in aws_iam_policy.this : role => policy.arn }
}

output "release_uri" {
  description = "For `register: release`, `uri:` in a specification."
  value       = "s3://${aws_s3_bucket.this["releases"].bucket}"
}

output "artifacts_destination" {
  description = "For MLflow's server."
  value       = "s3://${aws_s3_bucket.this["artifacts"].bucket}"
}
