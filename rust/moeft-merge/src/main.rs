//! `moeft-merge`: arguments -> recipe -> plan -> run -> report.

fn main() {}
