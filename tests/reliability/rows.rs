//! All rows, in the order of the table.

pub(crate) mod broken;
pub(crate) mod descriptors;
pub(crate) mod faults;
pub(crate) mod restart;
pub(crate) mod slow;
pub(crate) mod soak;

use crate::row::Row;

pub(crate) fn all() -> Vec<Row> {
    let mut rows = faults::rows();
    rows.extend(broken::rows());
    rows.extend(restart::rows());
    rows.push(slow::row());
    rows.push(descriptors::row());
    rows.push(soak::row());
    rows
}
