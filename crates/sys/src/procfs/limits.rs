//! `limits`: the resource limits, which anyone may read here (prlimit(2) asks for CAP_SYS_RESOURCE).

use super::{ParseError, bad};

/// Soft and hard limit by resource, in the order of setrlimit(2)'s numbers; `u64::MAX` is no limit.
pub fn parse(text: &str) -> Result<Vec<(u64, u64)>, ParseError> {
    // The name fills 25 columns and has spaces in it.
    const NAME_COLUMNS: usize = 25;
    text.lines()
        .skip(1)
        .map(|line| {
            let mut values = line.get(NAME_COLUMNS..).unwrap_or_default().split_ascii_whitespace();
            let mut value = || match values.next()? {
                "unlimited" => Some(u64::MAX),
                number => number.parse().ok(),
            };
            value().zip(value()).ok_or_else(|| bad("limits", line))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max nice priority         0                    7                    \n";
        assert_eq!(parse(text).unwrap(), [(u64::MAX, u64::MAX), (0, 7)]);
        assert!(parse("Limit\nMax cpu time              much\n").is_err());
        let own = std::fs::read_to_string("/proc/self/limits").unwrap();
        let all = parse(&own).unwrap();
        assert_eq!(all.len(), 16);
        let files = crate::inspect::limit(std::process::id() as i32, 7).unwrap();
        assert_eq!(all[7], files);
    }
}
