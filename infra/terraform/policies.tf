# Policies only: whether a user, a role of a node or of a service account gets them is yours to say.
resource "aws_iam_policy" "this" {
  for_each = local.policies
  name     = "${var.policy_prefix}-${each.key}"
  policy   = each.value
}
