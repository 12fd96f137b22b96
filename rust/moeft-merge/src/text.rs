//! Plans and reports for people.

use std::collections::BTreeMap;

use moeft_core::merge::{BaseCheck, MergeReport, Outline};

/// What a merge did.
pub fn report(report: &MergeReport) -> String {
    let resumed = match report.bytes_resumed {
        0 => String::new(),
        bytes => format!(" ({:.3} GB of it by an interrupted run)", bytes as f64 / 1e9),
    };
    let (gigabytes, out) = (report.bytes as f64 / 1e9, report.out.display());
    let mut lines = vec![
        format!("wrote {out}: {gigabytes:.3} GB in {:.1} s{resumed}", report.seconds),
        format!("tensors: {} merged, {} copied byte for byte", report.tensors_merged, report.tensors_copied),
    ];
    let mut branches: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in report.merged.values() {
        // Details of a branch, a ratio for example, are for the JSON report.
        let branch = tensor.branch.as_deref().and_then(|branch| branch.split_whitespace().next());
        branch.into_iter().for_each(|branch| *branches.entry(branch).or_default() += 1);
    }
    if !branches.is_empty() {
        let counts: Vec<String> = branches.iter().map(|(branch, count)| format!("{count} {branch}")).collect();
        lines.push(format!("{}: {}", report.method, counts.join(", ")));
    }
    let largest = report.merged.iter().max_by(|left, right| left.1.max_delta.total_cmp(&right.1.max_delta));
    if let Some((name, tensor)) = largest {
        let (change, weight) = (tensor.max_delta, tensor.max_weight);
        lines.push(format!("largest change: {change:.3e} in {name}, whose largest weight is {weight:.3e}"));
    }
    let check = match report.base_check {
        BaseCheck::Verified => "verified: every adapter was trained on this base",
        BaseCheck::Unverified => "unverified: an adapter carries no fingerprint; names and shapes fit",
        BaseCheck::NoAdapter => "no adapter to check it for",
    };
    lines.push(format!("base: {check} ({})", report.base_fingerprint));
    lines.join("\n")
}

/// What a merge would do.
pub fn outline(outline: &Outline) -> String {
    let mut lines = Vec::with_capacity(outline.tensors.len() + 4);
    for tensor in &outline.tensors {
        let inputs = if tensor.inputs.is_empty() { String::new() } else { format!(" <- {}", tensor.inputs.join(", ")) };
        lines.push(format!("{:<6} {} ({}){inputs}", tensor.action, tensor.name, tensor.file));
    }
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    lines.push(format!(
        "{}: {} tensors in {} files; reads {:.1} MB in each pass, writes {:.1} MB, needs about {:.0} MB of memory",
        outline.method,
        outline.tensors.len(),
        outline.files.len(),
        megabytes(outline.read_bytes),
        megabytes(outline.written_bytes),
        megabytes(outline.memory_bytes),
    ));
    lines.join("\n")
}
